"""progress, brts, tor and egs against implementations written here from their definitions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import posixpath
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import Candidate, Window
from genssd.engine.criteria.criterion import Criterion
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.criteria.shell_commands import read_commands
from genssd.engine.search.search_options import SearchOptions
from genssd.kernels.logprob import TokenStats


def make_stats(rank: Sequence[int]) -> TokenStats:
    n = len(rank)
    zero = torch.zeros(n)
    return TokenStats(
        logprob=zero, logsumexp=zero, entropy=zero, sum_p2=zero, rank=torch.tensor(rank, dtype=torch.int32)
    )


def fake_logprob(prefix: Sequence[int], token: int) -> float:
    """A log-probability that depends on the whole prefix."""
    return -float((sum((i + 1) * t for i, t in enumerate(prefix)) * 31 + 7 * token) % 97) / 8.0  # exact in float32


def local_logprob(ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]:
    return [
        torch.tensor([fake_logprob(ids[context:t], ids[t]) for t in range(start, end)])
        for context, start, end in windows
    ]


def of_text(text: str, *, cut: int = 0, final: bool = True, answer: str | None = None) -> Candidate:
    """Return a candidate whose tokens are characters. cut: number of characters in its history."""
    ids = tuple(map(ord, text))
    return Candidate(
        token_ids=ids[cut:],
        stats=make_stats([1] * (len(ids) - cut)),
        history_ids=ids[:cut],
        history=make_stats([1] * cut),
        final=final,
        finished=False,
        pieces_of=lambda some: [chr(i) for i in some],
        local_logprob=local_logprob,
        encode=lambda some: [ord(c) for c in some],
        answer=answer,
    )


def value(name: str, candidate: Candidate) -> float:
    """Return a candidate's value under the criterion of a name."""
    criterion = resolve(name)
    assert isinstance(criterion, Criterion)
    return criterion.score(candidate)


def estimate(prefix: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens after a prefix; the space before it belongs to the answer."""
    before, after = f"{prefix}\nThe answer is", f" {answer}"
    ids = [ord(c) for c in before + after]
    return float(np.mean([fake_logprob(ids[:t], ids[t]) for t in range(len(before), len(ids))]))


@pytest.mark.parametrize("seed", range(6))
def test_progress_is_the_fraction_of_tokens_after_which_the_answer_is_likelier(seed: int) -> None:
    generator = np.random.default_rng(seed)
    steps = ["".join(generator.choice(list("abcdefg"), size=generator.integers(20, 30))) + "\n" for _ in range(6)]
    text = "".join(steps)
    judged = steps[:-1]  # the last one states the answer
    ends = np.cumsum([0, *map(len, judged)])
    values = [estimate(text[:end], "12") for end in ends]
    rising = sum(len(step) for step, a, b in zip(judged, values[:-1], values[1:], strict=True) if b > a)
    made = of_text(text, answer="12")
    assert value("progress", made) == pytest.approx(rising / ends[-1])
    assert value("progress(reduce='gain')", made) == pytest.approx(values[-1] - values[0], abs=1e-5)
    # two segments of two and three steps
    few = [values[0], values[2], values[5]]
    expected = (ends[2] * (few[1] > few[0]) + (ends[5] - ends[2]) * (few[2] > few[1])) / ends[5]
    assert value("progress(segments=2)", made) == pytest.approx(expected)
    # a chunk of a search: from its beginning to its end, nothing left out before the response ends
    cut = int(ends[3])
    chunk = of_text(text[: int(ends[5])], cut=cut, final=False, answer="12")
    gain = estimate(text[: int(ends[5])], "12") - estimate(text[:cut], "12")
    assert value("progress(reduce='gain')", chunk) == pytest.approx(gain, abs=1e-5)


def test_joining_segments_of_the_same_sign_does_not_change_the_fraction() -> None:
    """The paper joins neighbours whose progress has the same sign; what rises keeps its tokens."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        lengths, values = generator.integers(1, 9, size=8), np.cumsum(generator.normal(size=9))
        plain = sum(n for n, d in zip(lengths, np.diff(values), strict=True) if d > 0)
        joined = 0
        for _, run in itertools.groupby(range(8), key=lambda k: values[k + 1] > values[k]):
            members = list(run)
            if values[members[-1] + 1] > values[members[0]]:
                joined += sum(lengths[members])
        assert joined == plain


def test_progress_of_a_single_step_is_that_of_all_of_it() -> None:
    text = "one step that states the answer"
    gain = estimate(text, "3") - estimate("", "3")
    assert value("progress(reduce='gain')", of_text(text, answer="3")) == pytest.approx(gain, abs=1e-5)
    with pytest.raises(InputError, match="progress needs the reference answer"):
        value("progress", of_text(text))
    with pytest.raises(InputError, match="segments must be at least 1"):
        resolve("progress(segments=0)")


@given(
    st.lists(
        st.tuples(st.sampled_from([True, False, None]), st.lists(st.integers(1, 40), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    )
)
@settings(deadline=None)
def test_brts_picks_as_the_three_tiers_do(responses: list[tuple[bool | None, list[int]]]) -> None:
    """The aligned response among the right ones; where there is none, the aligned one of all. Ties go to the first."""
    overlaps = [float(np.mean(np.array(ranks) <= 16)) for _, ranks in responses]
    right = [i for i, (correct, _) in enumerate(responses) if correct]
    among = right or list(range(len(responses)))
    expected = max(among, key=lambda i: (overlaps[i], -i))
    scores = [
        value(
            "brts",
            Candidate(token_ids=tuple(ranks), stats=make_stats(ranks), final=True, finished=True, correct=correct),
        )
        for correct, ranks in responses
    ]
    assert scores.index(max(scores)) == expected


COMMANDS = """I look around.
```bash
ls src
cat README.md
```
Then I write.
```bash
cd src && touch new.py
python3 -m pytest tests 2>/dev/null
```
```python
import os  # no shell
```
```sh
sed -i 's/a/b/' /etc/hosts > out.txt
cat <<'EOF' > deep/file.txt
rm not/a/command
EOF
```
```console
$ cat deep/file.txt
the output: touch nothing
$ rm ~/old
```
"""


def test_commands_are_read_from_blocks() -> None:
    read = [(c.turn, c.kind, c.paths, c.is_test) for c in read_commands(COMMANDS)]
    start = "/~start"
    assert read == [
        (0, "observation", (f"{start}/src",), False),
        (0, "observation", (f"{start}/README.md",), False),
        (1, "action", (f"{start}/src/new.py",), False),
        (1, "action", (f"{start}/src/tests",), True),
        (2, "action", ("/etc/hosts", f"{start}/src/out.txt"), False),
        (2, "action", (f"{start}/src/deep/file.txt",), False),
        (3, "observation", (f"{start}/src/deep/file.txt",), False),
        (3, "action", ("/~home/old",), False),
    ]
    assert read_commands("no commands: rm x\n```\nrm x\n```") == []


def test_commands_are_read_from_terminus_answers() -> None:
    turns = [["ls -la /app\n", "cd /app\n"], ["cat run.sh | head\n", "bash run.sh\n"], ["python3 -c 'x = \"1;2\"'\n"]]
    text = "\n".join(
        json.dumps({"analysis": "a", "commands": [{"keystrokes": k, "duration": 1} for k in turn]}) for turn in turns
    )
    read = [(c.turn, c.kind, c.paths) for c in read_commands(text)]
    assert read[:3] == [
        (1, "observation", ("/app",)),
        (2, "observation", ("/app/run.sh",)),
        (2, "action", ("/app/run.sh",)),
    ]
    assert read[3][:2] == (3, "action")


@pytest.mark.parametrize(
    ("seen", "done", "is_supported"),
    [
        ("cat src/foo.py", "sed -i s/a/b/ src/foo.py", True),  # the paper's three examples
        ("ls src/", "touch src/foo.py", True),
        ("cat scripts/run.sh", "bash scripts/run.sh", True),
        ("cat README.md", "sed -i s/a/b/ src/foo.py", False),
        ("cat src/foo.py", "rm -r src", False),
        ("ls src", "touch srcfoo.py", False),
        ("ls", "touch new.py", True),
        ("grep -n def src/foo.py", "cp src/foo.py /tmp/x", True),
    ],
)
def test_an_action_is_supported_by_what_was_seen_of_its_place(seen: str, done: str, is_supported: bool) -> None:
    apart = f"```bash\n{seen}\n```\nso\n```bash\n{done}\n```\n"
    together = f"```bash\n{seen}\n{done}\n```\n"
    backwards = f"```bash\n{done}\n```\nso\n```bash\n{seen}\n```\n"
    assert value("tor", of_text(apart)) == float(is_supported)
    assert value("tor", of_text(together)) == 0.0, "its output was not seen yet"
    assert value("tor", of_text(backwards)) == 0.0
    assert value("egs", of_text(apart)) == 0.0, "nothing verifies it"
    assert value("egs", of_text(f"{apart}```bash\npytest\n```")) == 0.5 * is_supported, "the tests are an action, too"


PATHS = [f"{a}/{b}" for a in ("x", "y") for b in ("m.txt", "n.txt")]
EVENTS = st.tuples(st.sampled_from(["cat", "ls", "touch"]), st.sampled_from(PATHS))


@given(st.lists(st.lists(EVENTS, min_size=1, max_size=3), max_size=5))
@settings(deadline=None)
def test_tor_and_egs_are_counted_action_by_action(turns: list[list[tuple[str, str]]]) -> None:
    text = ""
    events: list[tuple[int, str, str]] = []
    for k, turn in enumerate(turns):
        lines = [(program, posixpath.dirname(path) if program == "ls" else path) for program, path in turn]
        events += [(k, *line) for line in lines]
        text += "```bash\n" + "".join(f"{program} {path}\n" for program, path in lines) + "```\n"

    def aligned(seen: str, path: str) -> bool:
        return path == seen or path.startswith(f"{seen}/")

    actions = [(k, path) for k, program, path in events if program == "touch"]
    seen = [(k, path) for k, program, path in events if program != "touch"]
    before = [any(j < k and aligned(s, path) for j, s in seen) for k, path in actions]
    after = [any(j > k and aligned(s, path) for j, s in seen) for k, path in actions]
    count = max(1, len(actions))
    made = of_text(text + " ")
    assert value("tor", made) == pytest.approx(sum(before) / count)
    both = sum(a and b for a, b in zip(before, after, strict=True))
    assert value("egs", made) == pytest.approx(both / count)


def test_tor_of_a_chunk_counts_its_own_actions_and_sees_the_history() -> None:
    first = "```bash\nls src\ntouch a\n```\n"
    made = of_text(f"{first}```bash\ntouch src/b\n```\n", cut=len(first), final=False)
    assert value("tor", made) == 1.0


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        ("brts", "cannot judge chunks: a chunk is neither right nor wrong"),
        ("egs", "cannot judge chunks: what verifies a chunk's actions comes after it"),
        ("0.5*ppl + 0.5*brts", "cannot judge chunks: a chunk is neither right nor wrong"),
    ],
)
def test_what_needs_a_whole_response_is_refused_in_the_search(criterion: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        SearchOptions(criterion=criterion)


@pytest.mark.parametrize("criterion", ["progress(reduce='gain')", "tor", "0.5*tor + 0.5*ppl"])
def test_the_others_search(criterion: str) -> None:
    SearchOptions(criterion=criterion)


def test_values_are_finite_where_the_student_cannot_write_the_answer() -> None:
    def impossible(ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]:
        return [torch.full((end - start,), -math.inf) for _, start, end in windows]

    made = dataclasses.replace(of_text("a\nb\nc\n", answer="1"), local_logprob=impossible)
    assert value("progress", made) == 0.0
    assert value("progress(reduce='gain')", made) == 0.0
