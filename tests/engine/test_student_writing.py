"""Candidates that the student writes beside the teacher's, and responses that are rewound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.toys import Pair

from genssd import rewind
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

PROMPT = [44, 239, 183]
FOUR = Chunk(tokens=4, until=None)
GREEDY = Sampling(temperature=0.0)


def greedy_turns(pair: Pair, writers: list[str]) -> list[int]:
    """The greedy tokens of two transformers models that take turns of four tokens."""
    ids = list(PROMPT)
    for writer in writers:
        model = pair.teacher_model if writer == "teacher" else pair.student_model
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def take_turns(engine: Engine, writers: list[str]) -> Branch:
    branch = engine.branch(PROMPT, sampling=GREEDY)
    for writer in writers:
        ((child,),) = engine.expand([branch], 1, FOUR, model=writer)  # type: ignore[arg-type]
        child.commit()
        branch.drop()
        branch = child
        if branch.ended is not None:
            break
    return branch


@pytest.mark.parametrize("writers", [["student"], ["student", "teacher", "student"], ["teacher", "student", "teacher"]])
def test_turns_are_those_of_two_models_in_transformers(engine: Engine, pair: Pair, writers: list[str]) -> None:
    branch = take_turns(engine, writers)
    assert branch.ended is None, "take another prompt: the turns end early"
    assert branch.history == greedy_turns(pair, writers)
    response = branch.response()
    of_teacher = pair.logprobs("teacher", PROMPT, branch.history)
    assert response.teacher_logprob is not None
    torch.testing.assert_close(response.teacher_logprob.double(), of_teacher, atol=1e-4, rtol=0)
    of_student = pair.logprobs("student", PROMPT, branch.history)
    torch.testing.assert_close(response.logprob, of_student, atol=1e-4, rtol=0)
    branch.drop()


def test_both_write_candidates_of_one_branch(engine: Engine, pair: Pair) -> None:
    with engine.branch(PROMPT, seed=3) as root:
        ((*own,),) = engine.expand([root], 2, FOUR, model="student", sampling=Sampling(temperature=0.5))
        children = [*own, *root.expand(2, FOUR)]
        assert [child.trace for child in children] == [(0,), (1,), (2,), (3,)]
        for child in children:
            for role, logprob in (("student", child.stats.logprob), ("teacher", child.writer_logprob)):
                exact = pair.logprobs(role, PROMPT, child.chunk)
                torch.testing.assert_close(logprob.double(), exact, atol=1e-4, rtol=0)
            candidate = child.candidate()
            assert candidate.token_ids == tuple(child.chunk)
            child.drop()


def test_a_students_first_candidate_draws_what_it_writes_alone(engine: Engine) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9)
    ((alone,),) = engine.generate([PROMPT], model="student", sampling=sampling, max_tokens=12, seed=9)
    with engine.branch(PROMPT, sampling=sampling, seed=9, max_tokens=12) as root:
        (((child),),) = engine.expand([root], 1, Chunk(tokens=12, until=None), model="student")
        assert tuple(child.chunk) == alone.token_ids
        torch.testing.assert_close(child.stats.logprob, torch.tensor(alone.logprob))
        child.drop()


def test_a_rewound_branch_goes_on_as_if_nothing_had_followed(engine: Engine, pair: Pair) -> None:
    whole = take_turns(engine, ["teacher", "student", "teacher"])
    for length in (0, 3, 4, 7, len(whole.history)):
        rewound = rewind(whole, length)
        assert (rewound.history, rewound.student_ids) == (whole.history[:length], tuple(whole.history[:length]))
        assert len(rewound.response().stats) == length
        ((child,),) = engine.expand([rewound], 1, FOUR, model="student")
        child.commit()
        of_teacher = child.response().teacher_logprob
        assert of_teacher is not None
        exact = pair.logprobs("teacher", PROMPT, child.history)
        torch.testing.assert_close(of_teacher.double(), exact, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            child.response().logprob, pair.logprobs("student", PROMPT, child.history), atol=1e-4, rtol=0
        )
        rewound.drop()
        child.drop()
    for length in (-1, len(whole.history) + 1):
        with pytest.raises(InputError, match=rf"length must lie in the committed response of .*, not {length}"):
            rewind(whole, length)
    whole.drop()


def test_candidates_that_do_not_fit_change_nothing(pair: Pair) -> None:
    engine = pair.engine(memory_bytes=6 * 16 * 1024)
    with engine.branch(PROMPT) as root:
        held = engine.pages_in_use[0]
        with pytest.raises(CapacityError):
            engine.expand([root], 64, Chunk(tokens=64, until=None), model="student")
        assert engine.pages_in_use[0] == held
        assert root.num_children == 0


def test_what_a_student_cannot_do_is_refused(engine: Engine, pair: Pair, tmp_path: Path) -> None:
    with engine.branch(PROMPT) as root, pytest.raises(InputError, match="sampling is for model='student'"):
        engine.expand([root], 1, FOUR, sampling=GREEDY)
    alone = Engine.from_pretrained(pair.teacher, memory_bytes=1 << 22)
    with alone.branch(PROMPT) as root, pytest.raises(InputError, match="this engine has no student"):
        alone.expand([root], 1, FOUR, model="student")
