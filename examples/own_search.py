"""Write a search of your own on branches: go back when no candidate is good enough.

    python examples/own_search.py [TEACHER STUDENT]

A branch is one response under construction. `expand` samples candidates and has the student score them, `commit` makes
a candidate part of the response, `drop` returns its pages of the KV cache, as does the end of a `with` block or of the
last reference to it. Branches share the pages of their common beginning, so keeping an earlier branch to return to
costs almost nothing.
"""

from __future__ import annotations

import sys
from importlib.resources import files

from genssd import Branch, Chunk, Engine

PAIR = files("genssd.distill.small_pair")
LINE = Chunk(tokens=1, until="\n", limit=64)
LIMIT = -0.2  # least mean log-probability of a line, nats per token
MAX_EXPANSIONS = 24


def mean_logprob(branch: Branch) -> float:
    return float(branch.stats.logprob.mean())


def depth_first(root: Branch, candidates: int = 3) -> tuple[Branch | None, int]:
    """Return a finished response all of whose lines pass LIMIT, or None, and the number of expansions."""
    stack, expansions = [root], 0
    while stack and expansions < MAX_EXPANSIONS:
        branch = stack.pop()
        if branch.ended == "finished":
            return branch, expansions
        expansions += 1
        children = branch.expand(candidates, LINE) if branch.ended is None else []
        for child in sorted(children, key=mean_logprob):  # the best is popped first
            if mean_logprob(child) >= LIMIT:
                child.commit()
                stack.append(child)
    return None, expansions


def main(teacher: str = str(PAIR / "teacher"), student: str = str(PAIR / "student")) -> None:
    engine = Engine.from_pretrained(teacher, student, memory_bytes=1 << 28)
    question = "Max counts 23 red, 61 blue, 38 green and 54 white stamps. How many stamps are there?"
    response, expansions = depth_first(engine.branch([{"role": "user", "content": question}]))
    print(f"{expansions} expansions, {engine.usage.sampled_tokens} tokens sampled")
    print("no response passed the limit" if response is None else response.text)
    del response  # the pages of branches that nothing refers to are free: those that the search left as well
    print(f"{engine.pages_in_use[0]} pages still held")


if __name__ == "__main__":
    main(*sys.argv[1:])
