"""Let the student choose what the teacher writes, and look at what it chose from.

    python examples/select_expand.py [TEACHER STUDENT]

TEACHER and STUDENT are hub ids or local directories of two models with the same tokenizer. Without them the small pair
that ships with genssd is used: it solves sums in steps, one line each.
"""

from __future__ import annotations

import sys
from importlib.resources import files

from genssd import Chunk, Engine, SearchOptions

PAIR = files("genssd.distill.small_pair")
QUESTION = "Tom counts 34 red, 57 blue, 12 green and 45 white cards. How many cards are there?"


def main(teacher: str = str(PAIR / "teacher"), student: str = str(PAIR / "student")) -> None:
    engine = Engine.from_pretrained(teacher, student, memory_bytes=1 << 28)
    prompt = [{"role": "user", "content": QUESTION}]
    # a candidate ends at the end of its line; the student keeps the line that surprises it least
    options = SearchOptions(candidates=4, chunk=Chunk(tokens=1, until="\n", limit=64), criterion="ppl", max_tokens=192)
    (selection,) = engine.select_expand([prompt], options)

    text_of = engine.tokenizer("teacher").decode
    for candidate in selection.tree:
        print(
            f"round {candidate.round}  {candidate.score:8.3f}  {candidate.verdict:9}  {text_of(candidate.token_ids)!r}"
        )
    best = selection.best
    print(f"\n{best.text}\n\n{best.status}; perplexity {best.score:.3f}; {len(best.token_ids)} tokens kept")


if __name__ == "__main__":
    main(*sys.argv[1:])
