"""The search of a teacher and a student with different tokenizers, against scoring the student's whole tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.byte_tokenizers import TEXTS, build, save
from support.search_criteria import list_search_criteria
from support.toys import save_markov, token_of
from transformers import AutoModelForCausalLM

from genssd.engine.calls import session as session_module
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.usage import Usage
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.teacher import TeacherStudentGap
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.readers import text_encoder
from genssd.engine.readers.byte_reader import ByteReader
from genssd.engine.readers.reading import ByteSpans
from genssd.engine.search.budget import Budget
from genssd.engine.search.selection import Selection, Trajectory
from genssd.kernels.logprob import TokenStats

EIGHT = Chunk(tokens=8, until=None)
PROMPTS = [TEXTS[0][:50], "Step 1:", "数学", "\tif x"]


@dataclass(frozen=True, slots=True)
class Directories:
    """Two random models: a byte-level tokenizer, and one in the style of SentencePiece."""

    qwen: Path
    gemma: Path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    root = tmp_path_factory.mktemp("two")
    qwen = save(root / "qwen", build("qwen"), seed=1, max_position_embeddings=256)
    gemma = save(root / "gemma", build("gemma", size=700), seed=2, max_position_embeddings=1024)
    return Directories(qwen, gemma)


def open_pair(teacher: Path, student: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(teacher, student, dtype="float32", **{"memory_bytes": 1 << 24, **options})


@pytest.fixture(scope="module")
def engines(directories: Directories) -> dict[str, Engine]:
    return {
        "qwen": open_pair(directories.qwen, directories.gemma),
        "gemma": open_pair(directories.gemma, directories.qwen),
    }


def with_pages(engine: Engine, num_pages: int, page_size: int) -> Engine:
    """An engine over the same models with caches of so many pages."""
    resources, runners, usage = engine._resources, {}, Usage()
    for role, runner in resources.runners.items():
        pool = PagePool.for_model(runner.decoder, num_pages, page_size)
        pool.kv.fill_(torch.nan)
        runners[role] = PagedRunner(role, runner.directory, runner.decoder, pool, usage=usage)
    return Engine(replace(resources, runners=runners, usage=usage, reservations={}))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of; lines of information depend on what ran in this process before."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def outcome(selection: Selection) -> list[Any]:
    return [
        selection.error,
        [
            (t.token_ids, t.student_ids, t.status, t.trace, [len(r.ids) for r in t.readings])
            for t in selection.trajectories
        ],
        [(r.trace, r.token_ids, r.reading.ids, r.verdict) for r in selection.tree],
    ]


def check_scores(engine: Engine, selection: Selection, trajectory: Trajectory) -> None:
    """The student's tokens are those of the whole text, and their statistics those of one pass over all of them."""
    student = engine.tokenizer("student")
    written = trajectory.token_ids[: len(trajectory.token_ids) - (trajectory.status == "finished")]
    reader = engine.reader
    assert isinstance(reader, ByteReader)
    text = reader.table.join(written).decode(errors="surrogateescape")
    ends = [student.eos_token_id] if trajectory.status == "finished" else []
    if text.isprintable() and not any("\udc80" <= c <= "\udcff" for c in text):
        assert [*trajectory.student_ids] == student.encode_plain(text) + ends
    (stats,) = engine.score([list(selection.student_prompt_ids)], [list(trajectory.student_ids)])
    for name in ("logprob", "entropy", "sum_p2", "logsumexp"):
        torch.testing.assert_close(getattr(trajectory.stats, name), getattr(stats, name), atol=1e-4, rtol=1e-4)
    assert sum(sum(r.lengths or ()) for r in trajectory.readings) == len(text.encode(errors="surrogateescape"))


@pytest.mark.parametrize("teacher", ["qwen", "gemma"])
@pytest.mark.parametrize(("tokens", "beam"), [(1, 1), (8, 2), (40, 1)])
def test_scores_in_chunks_are_those_of_the_whole_text(
    engines: dict[str, Engine], teacher: str, tokens: int, beam: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines[teacher]
    selections = engine.select_expand(
        PROMPTS, candidates=3, beam=beam, chunk=Chunk(tokens=tokens, until=None), max_tokens=41, loop_guard=False
    )
    for selection in selections:
        assert selection.trajectories
        for trajectory in selection.trajectories:
            check_scores(engine, selection, trajectory)
        assert all(len(r.stats) == len(r.reading.judged_ids) > 0 for r in selection.tree)
        assert any(r.reading.is_provisional for r in selection.tree) or tokens > 1
    assert (engine.usage.drifted_responses, engine.pages_in_use[0], warnings_of(caplog)) == (0, 0, [])


def test_against_transformers_in_float64(engines: dict[str, Engine], directories: Directories) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories.gemma, dtype=torch.float64)
    (selection,) = engines["qwen"].select_expand(PROMPTS[:1], candidates=2, chunk=EIGHT, max_tokens=30)
    best, prompt = selection.best, list(selection.student_prompt_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *best.student_ids]])).logits[0].log_softmax(dim=-1)[len(prompt) - 1 : -1]
    expected = logits.gather(1, torch.tensor(best.student_ids)[:, None])[:, 0]
    torch.testing.assert_close(best.stats.logprob.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beam", [1, 2])
def test_suspension_changes_nothing(engines: dict[str, Engine], beam: int) -> None:
    engine = engines["qwen"]
    options: dict[str, Any] = {"candidates": 2, "beam": beam, "chunk": Chunk(tokens=3, until=None), "max_tokens": 48}
    ample, tight = with_pages(engine, 2000, 1), with_pages(engine, 100, 1)
    expected = [outcome(s) for s in ample.select_expand(PROMPTS, **options)]
    assert [outcome(s) for s in tight.select_expand(PROMPTS, **options)] == expected
    assert tight.usage.prefill_tokens > ample.usage.prefill_tokens, "no prompt was suspended"
    assert tight.usage.drifted_responses == 0
    for runner in tight._resources.runners.values():
        runner.tree.check()
    assert tight.pages_in_use[0] == 0


def test_text_that_takes_more_pages_than_reserved_is_scored_in_parts(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = with_pages(engines["gemma"], 400, 2)
    options: dict[str, Any] = {"candidates": 3, "chunk": Chunk(tokens=6, until=None), "max_tokens": 24}
    expected = [outcome(s) for s in engine.select_expand(PROMPTS, **options)]
    computed = engine.usage.computed_tokens
    monkeypatch.setattr(session_module, "TOKENS_PER_TOKEN", 0)
    assert [outcome(s) for s in engine.select_expand(PROMPTS, **options)] == expected
    assert engine.usage.computed_tokens > 2 * computed + 10, "kept candidates are computed again"
    engine._resources.runners["student"].tree.check()
    small = with_pages(engines["gemma"], 26, 2)
    (failed,) = small.iter_select_expand([PROMPTS[2]], candidates=1, chunk=Chunk(tokens=40, until=None), max_tokens=40)
    assert failed.error is not None
    assert "the student reads a candidate as" in failed.error
    assert "raise memory_bytes or memory_utilization, or ask for shorter chunks" in failed.error


def test_a_drift_is_reported_and_the_response_scored_again(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With nothing held back, the words that chunks divide have other tokens than the whole text."""
    after = torch.full((4, 4), -1e3)
    after[range(4), [1, 2, 3, 0]] = 0.0
    save_markov(tmp_path, [token_of(letter) for letter in "the "], after)
    engine = open_pair(tmp_path, directories.gemma)
    options: dict[str, Any] = {"candidates": 2, "chunk": Chunk(tokens=6, until=None), "max_tokens": 40}
    (sound,) = engine.select_expand(["t"], **options)
    assert (sound.best.is_drifted, engine.usage.drifted_responses) == (False, 0)
    monkeypatch.setattr(text_encoder.TextEncoder, "_count_certain", lambda self, data, lengths, words: len(lengths))
    with caplog.at_level(logging.WARNING):
        (selection,) = engine.select_expand(["t"], **options)
    (warning,) = warnings_of(caplog)
    assert engine.usage.drifted_responses == 1
    assert "others than those that it read chunk by chunk" in warning
    best = selection.best
    assert (best.is_drifted, best.student_ids) == (True, sound.best.student_ids)
    check_scores(engine, selection, best)
    assert len(best.readings) == len(best.chunks) == 7


def test_responses_that_were_cut_or_pruned_are_read_to_their_end(engines: dict[str, Engine]) -> None:
    engine = engines["gemma"]
    pruned = engine.select_expand(PROMPTS, candidates=2, chunk=EIGHT, max_tokens=40, threshold=math.exp(20.0))
    budget = engine.select_expand(PROMPTS, candidates=2, chunk=EIGHT, max_tokens=40, prompt_budget=Budget(tokens=40))
    seen = set()
    for selection in [*pruned, *budget]:
        for trajectory in selection.trajectories:
            seen.add(trajectory.status)
            if trajectory.token_ids:
                check_scores(engine, selection, trajectory)
    assert "budget" in seen


def test_the_same_tokenizer_read_by_bytes(directories: Directories) -> None:
    """Read by bytes, the student has the tokens and scores that it has by ids."""
    engine = open_pair(directories.gemma, directories.gemma)
    tokenizer = engine.tokenizer("teacher")
    reader = ByteReader.of(tokenizer, tokenizer, "teacher", "student")
    by_bytes = Engine(replace(engine._resources, reader=reader, usage=Usage(), reservations={}))
    for selection in by_bytes.select_expand(PROMPTS, candidates=3, chunk=EIGHT, max_tokens=30):
        check_scores(by_bytes, selection, selection.best)
    one, other = (e.select_expand(PROMPTS, candidates=1, chunk=EIGHT, max_tokens=30) for e in (engine, by_bytes))
    assert [s.best.token_ids for s in one] == [s.best.token_ids for s in other]


def test_every_criterion_judges_such_candidates(engines: dict[str, Engine]) -> None:
    for name in list_search_criteria():
        for selection in engines["qwen"].select_expand(
            PROMPTS[:2], criterion=name, candidates=2, chunk=EIGHT, max_tokens=20, answers=["42", "7"]
        ):
            assert all(not math.isnan(r.score) for r in selection.tree), name


def test_perplexity_per_byte(engines: dict[str, Engine]) -> None:
    (selection,) = engines["qwen"].select_expand(
        PROMPTS[:1], criterion="ppl(norm='byte')", candidates=3, chunk=EIGHT, max_tokens=32
    )
    assert any(r.ended == "chunk" for r in selection.tree)
    for record in selection.tree:
        if record.ended == "chunk":
            nll = -float(record.stats.logprob.double().sum()) / sum(record.reading.judged_lengths or ())
            assert record.score == pytest.approx(math.exp(nll), rel=1e-6)


def make_candidate(
    student: Sequence[float], teacher: Sequence[float], spans: ByteSpans | None, **fields: Any
) -> Candidate:
    ids = tuple(range(len(student) - fields.get("num_history", 0)))
    cut, before = fields.pop("num_history", 0), fields.pop("num_teacher_history", 0)
    stats = [torch.tensor(student), *[torch.zeros(len(student))] * 3, torch.ones(len(student), dtype=torch.int32)]
    whole = TokenStats.from_values(stats)
    return Candidate(
        token_ids=ids, stats=whole[cut:], history_ids=tuple(range(cut)), history=whole[:cut], spans=spans,
        teacher_logprob=torch.tensor(teacher[before:]), history_teacher_logprob=torch.tensor(teacher[:before]),
        final=fields.get("finished", False), finished=fields.get("finished", False),
    )  # fmt: skip


def test_divergence_over_aligned_spans() -> None:
    """ "ab|cde|f|END" to the student, "a|bcd|e|f|END" to the teacher: spans "abcde", "f" and the end."""
    student, teacher = [-1.0, -2.0, -4.0, -8.0], [-0.1, -0.2, -0.3, -0.4, -0.5]
    spans = ByteSpans(student=(2, 3, 1, 0), teacher=(1, 3, 1, 1, 0))
    whole = make_candidate(student, teacher, spans, finished=True)
    gap = TeacherStudentGap()
    assert gap.score(whole) == pytest.approx(((3.0 - 0.6) + (4.0 - 0.4) + (8.0 - 0.5)) / 3)
    # the chunk "cde f": its first token begins where the teacher has no border
    cut = ByteSpans(student=(2, 3, 1), teacher=(1, 3, 1, 1))
    chunk = make_candidate(student[:3], teacher[:4], cut, num_history=1, num_teacher_history=1)
    assert gap.score(chunk) == pytest.approx(4.0 - 0.4)
    none = make_candidate(
        student[:2], teacher[:2], ByteSpans(student=(2, 2), teacher=(1, 2)), num_history=1, num_teacher_history=1
    )
    assert gap.score(none) == 0.0
    same = make_candidate(student, teacher[:4], ByteSpans(student=(1, 2, 3, 0), teacher=(1, 2, 3, 0)), finished=True)
    assert gap.score(same) == pytest.approx(gap.score(make_candidate(student, teacher[:4], None, finished=True)))


def test_a_short_last_chunk_borrows_the_same_text_of_both() -> None:
    spans = ByteSpans(student=(2, 3, 1, 0), teacher=(1, 3, 1, 1, 0))
    candidate = make_candidate([-1.0, -2.0, -4.0, -8.0], [-0.1, -0.2, -0.3, -0.4, -0.5], spans, num_history=3,
                               num_teacher_history=4, finished=True)  # fmt: skip
    longer = candidate.lengthened(2)
    assert (longer.logprob.tolist(), longer.history.logprob.tolist()) == ([-4.0, -8.0], [-1.0, -2.0])
    assert longer.teacher_logprob is not None
    torch.testing.assert_close(longer.teacher_logprob, torch.tensor([-0.4, -0.5]))
    assert TeacherStudentGap().score(longer) == pytest.approx(((4.0 - 0.4) + (8.0 - 0.5)) / 2)


def test_branches_of_own_searches(engines: dict[str, Engine]) -> None:
    engine = engines["qwen"]
    with engine.branch(PROMPTS[0]) as branch:
        child, other = branch.expand(2, 8)
        assert child.reading is not None
        assert child.candidate().token_ids == child.reading.judged_ids
        other.drop()
        child.commit()
        branch.drop()
        child.suspend()
        (grandchild,) = child.expand(1, 8)
        ids = [*child.student_ids, *(grandchild.reading.ids if grandchild.reading else ())]
        (stats,) = engine.score([list(child.prompt.student)], [ids])
        torch.testing.assert_close(
            stats.logprob[len(child.student_ids) :], grandchild.stats.logprob, atol=1e-4, rtol=1e-4
        )
        grandchild.drop()
        child.drop()
    assert engine.pages_in_use[0] == 0


def test_a_response_beyond_the_students_positions_fails_by_name(directories: Directories) -> None:
    engine = open_pair(directories.gemma, directories.qwen)
    (selection,) = engine.iter_select_expand(
        [PROMPTS[0] * 4], candidates=1, chunk=Chunk(tokens=150, until=None), max_tokens=150
    )
    assert selection.error is not None
    assert "and it has 256 positions; lower max_tokens" in selection.error
    with pytest.raises(CapacityError):
        engine.select_expand([PROMPTS[0] * 40], max_tokens=8)


def test_a_response_whose_end_is_beyond_the_students_positions_is_refused_by_name(directories: Directories) -> None:
    """What was held back has no position left: every chunk before it was read within them."""
    engine = open_pair(directories.gemma, directories.qwen)
    tokenizer, reader, num_refused = engine.tokenizer("student"), engine.reader, 0
    for count in range(100, 256):
        prompt = "x " * count
        if not 244 <= len(tokenizer.encode_prompt(prompt)) <= 253:
            continue
        with engine.branch(prompt, seed=count, max_tokens=100) as root:
            try:
                (child,) = root.expand(1, Chunk(tokens=6, until=None))
            except InputError:  # the chunk itself is too long
                continue
            with child:
                child.commit()
                whole = reader.read(child.history, held=b"", begins=True, ends=True).ids
                if len(child.prompt.student) + len(whole) <= 256:
                    child.finish_reading()
                    assert child.student_ids == whole
                    continue
                num_refused += 1
                with pytest.raises(InputError, match="and it has 256 positions; lower max_tokens"):
                    child.finish_reading()
    assert num_refused
    assert engine.pages_in_use[0] == 0


def test_a_prompt_of_token_ids_has_one_tokenizer(engines: dict[str, Engine]) -> None:
    engine = engines["qwen"]
    message = "the prompt is a list of the teacher's token ids, and the student has another tokenizer: give the prompt"
    with pytest.raises(InputError, match=rf"^prompt 1: {message}"):
        engine.select_expand(["x", [5, 6, 7]], max_tokens=4)
    with pytest.raises(InputError, match=message):
        engine.branch([5, 6, 7])
    with pytest.raises(InputError, match=message):
        engine.encode_pair([5, 6, 7])


def test_what_needs_the_same_tokens_is_refused(engines: dict[str, Engine]) -> None:
    with pytest.raises(InputError, match=r"rsd needs models whose tokens are the same: the student .* by its bytes"):
        engines["qwen"].generate(["x"], max_tokens=4, rsd=ReverseSpeculation())


def test_loading_says_that_the_student_reads_bytes(directories: Directories, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        open_pair(directories.qwen, directories.gemma)
    (line,) = [r.getMessage() for r in caplog.records if "by its bytes" in r.getMessage()]
    assert "\n" not in line
    assert f"student {directories.gemma} reads the text of the teacher {directories.qwen} by its bytes" in line
