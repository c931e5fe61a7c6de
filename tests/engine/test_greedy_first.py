"""A greedy completion beside sampled ones in one call: every completion is what a call of its own gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.toys import Pair

from genssd import Sampling
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine

Prompts = Callable[[int, int], list[list[int]]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9, temperature=0.7), Sampling(temperature=0.0)])
def test_the_first_completion_is_greedy_and_the_others_are_those_of_plain_sampling(
    pair: Pair, random_prompts: Prompts, sampling: Sampling
) -> None:
    prompts = random_prompts(3, 20)
    engine = pair.engine(max_num_seqs=5)  # less than the candidates of two prompts
    mixed = {
        g.index: g.completions
        for g in engine.iter_generate(prompts, n=4, sampling=sampling, max_tokens=12, greedy_first=True)
    }
    greedy = engine.generate(prompts, sampling=Sampling(temperature=0.0), max_tokens=12)
    plain = engine.generate(prompts, n=4, sampling=sampling, max_tokens=12)
    for index in range(3):
        assert mixed[index][0] == greedy[index][0]
        assert mixed[index][1:] == plain[index][1:]
    if sampling.temperature:
        assert any(len({c.token_ids for c in mixed[index]}) > 1 for index in range(3))


def test_reverse_speculation_has_no_greedy_completion(engine: Engine) -> None:
    with pytest.raises(InputError, match="greedy_first is for a model that writes alone"):
        engine.iter_generate(["a"], rsd=ReverseSpeculation(), greedy_first=True)
