"""Search with one chunk of lookahead: keep the line after which the student also finds the next line easy.

    python examples/lookahead.py [TEACHER STUDENT]

A greedy search takes the line that surprises the student least, even where it leads to lines that surprise it more.
Here every candidate is continued by candidates of its own, in one batch, and judged together with the best of them.
Nothing is sampled in vain: the continuations of the line that is kept are the candidates of the next round.
"""

from __future__ import annotations

import sys
from importlib.resources import files

from genssd import Branch, Chunk, Engine

PAIR = files("genssd.distill.small_pair")
LINE = Chunk(tokens=1, until="\n", limit=64)


def surprisal(branch: Branch) -> tuple[float, int]:
    """Return the student's surprisal of a branch's candidate chunk in nats, and its number of tokens."""
    return -float(branch.stats.logprob.sum()), len(branch.stats)


def per_token(*parts: tuple[float, int]) -> float:
    return sum(nats for nats, _ in parts) / sum(tokens for _, tokens in parts)


def look_ahead(engine: Engine, root: Branch, width: int = 3) -> Branch:
    """Return a response whose every line was chosen together with the best line that may follow it."""
    candidates = root.expand(width, LINE)
    while True:
        now = [surprisal(candidate) for candidate in candidates]
        for candidate in candidates:
            candidate.commit()  # the line becomes part of this branch's response; its siblings have their own
        live = [i for i, candidate in enumerate(candidates) if candidate.ended is None]
        following = dict(zip(live, engine.expand([candidates[i] for i in live], width, LINE), strict=True))
        values = [
            min(per_token(now[i], surprisal(after)) for after in following[i]) if i in following else per_token(now[i])
            for i in range(len(candidates))
        ]
        best = min(range(len(candidates)), key=values.__getitem__)
        if candidates[best].ended is not None:
            return candidates[best]
        candidates = following[best]  # nothing refers to the other branches any more: their pages are free


def main(teacher: str = str(PAIR / "teacher"), student: str = str(PAIR / "student")) -> None:
    engine = Engine.from_pretrained(teacher, student, memory_bytes=1 << 28)
    question = "Eva picks 23 red, 61 blue, 38 green and 54 white stamps. How many stamps are there?"
    response = look_ahead(engine, engine.branch([{"role": "user", "content": question}], max_tokens=192))
    mean = -float(response.response().stats.logprob.mean())
    print(f"{engine.usage.sampled_tokens} tokens sampled, {mean:.3f} nats per token, {response.ended}")
    print(response.text)
    del response
    print(f"{engine.pages_in_use[0]} pages still held")


if __name__ == "__main__":
    main(*sys.argv[1:])
