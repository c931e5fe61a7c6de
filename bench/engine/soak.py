"""A search with a beam in the smallest cache that can hold it: every prompt must finish, with the same responses.

    python -m bench.engine.soak [--prompts 200] [--budget 1.0] [--criterion "ppl(scope='trajectory')"]
    python -m bench.engine.soak --prompts 500 --budget 1.2 --threshold 1.5 --on-unlearnable resample

The problems of the small pair are searched with beam 2. First every prompt is run alone, to find the smallest cache in
which each of them finishes. Then all run together in a cache of `--budget` times that size, where prompts are suspended
and computed again, and in an ample one. The program fails unless all finish, to the same responses, and every page is
free.
It checks that the cache is divided well; the times are not compared with anything.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch

from genssd import Chunk, Engine, SearchOptions, Selection
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.models.pages import PAGE_SIZE
from genssd.engine.setup.loading import LoadedModels, load_models
from genssd.engine.texts.text import Prompt

PAIR = files("genssd.distill.small_pair")
AMPLE_PAGES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """The models, and the options of every search of the program."""

    models: LoadedModels
    options: SearchOptions

    @property
    def page_bytes(self) -> int:
        """Number of bytes of one page of both caches."""
        return PAGE_SIZE["cpu"] * sum(decoder.kv_bytes_per_token for decoder in self.models.decoders.values())

    def engine(self, num_pages: int) -> Engine:
        """Return an engine whose two caches have so many pages each."""
        return Engine(self.models.open_resources(num_pages * self.page_bytes, 1.0, max_num_seqs=256))

    def finishes(self, prompt: Prompt, num_pages: int) -> bool:
        """Return whether a prompt alone finishes in so many pages."""
        (selection,) = self.engine(num_pages).iter_select_expand([prompt], self.options)
        return selection.error is None

    def largest_need(self, prompts: Sequence[Prompt]) -> int:
        """Return the smallest number of pages in which each of the prompts finishes alone."""
        need = 1
        for prompt in prompts:
            if self.finishes(prompt, need):
                continue
            below, above = need, 2 * need
            while not self.finishes(prompt, above):
                below, above = above, 2 * above
            while above - below > 1:
                middle = (below + above) // 2
                below, above = (below, middle) if self.finishes(prompt, middle) else (middle, above)
            need = above
        return need


def outcomes(selections: Sequence[Selection]) -> list[object]:
    """Return what must not depend on the size of the cache."""
    return [
        (
            s.error,
            [(t.token_ids, t.status, t.trace) for t in s.trajectories],
            [(r.trace, r.verdict) for r in s.tree],
            s.rounds,
        )
        for s in selections
    ]


def run(soak: Soak, prompts: Sequence[Prompt], num_pages: int, name: str) -> tuple[list[Selection], int]:
    """Run all prompts together; return their outcomes and the number of prompt and response tokens computed again."""
    engine, begin = soak.engine(num_pages), time.perf_counter()
    selections = sorted(engine.iter_select_expand(prompts, soak.options), key=lambda s: s.index)
    failed = sum(s.error is not None for s in selections)
    held, _ = engine.pages_in_use
    print(
        f"{name}: {num_pages} pages ({num_pages * soak.page_bytes} bytes), {len(selections) - failed} of {len(prompts)}"
        f" prompts finish, {engine.usage.sampled_tokens} tokens sampled, {engine.usage.prefill_tokens} computed from "
        f"prompts and suspended responses, {held} pages leaked, {time.perf_counter() - begin:.0f} s"
    )
    if held:
        sys.exit(f"{name}: {held} pages leaked")
    return selections, engine.usage.prefill_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--beam", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--criterion", default="ppl(scope='trajectory')")
    parser.add_argument(
        "--budget", type=float, default=1.0, help="pages of the tight cache per page of the largest need"
    )
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--on-unlearnable", default="stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models(
        str(PAIR / "teacher"), str(PAIR / "student"), "float32", torch.device("cpu"), deterministic=True
    )
    options = SearchOptions(
        candidates=arguments.candidates,
        beam=arguments.beam,
        chunk=Chunk(tokens=1, until="\n", limit=64),
        criterion=arguments.criterion,
        max_tokens=arguments.max_tokens,
        threshold=arguments.threshold,
        on_unlearnable=arguments.on_unlearnable,
    )
    soak = Soak(models=models, options=options)
    prompts = [[{"role": "user", "content": p.question}] for p in make_problems(arguments.prompts, seed=0)]
    need = soak.largest_need(prompts)
    print(f"largest need of a prompt alone: {need} pages; in {need - 1} pages one of them fails")
    ample, computed_once = run(soak, prompts, AMPLE_PAGES, "ample cache")
    if any(s.error is not None for s in ample):
        sys.exit("a prompt does not finish in the ample cache")
    tight, computed = run(soak, prompts, int(need * arguments.budget), f"{arguments.budget:g} times the largest need")
    if any(s.error is not None for s in tight):
        sys.exit("a prompt does not finish in the tight cache")
    print(f"rounds: {dict(Counter(r.decision for s in ample for r in s.rounds))}")
    print(f"{computed - computed_once} tokens computed again after suspensions")
    different = sum(one != other for one, other in zip(outcomes(tight), outcomes(ample), strict=True))
    if different:
        sys.exit(f"{different} prompts have another outcome than in the ample cache")
    print("the same outcomes in both caches")


if __name__ == "__main__":
    main()
