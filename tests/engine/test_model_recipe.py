"""The recipe "add a model family" of docs/recipes.md, followed for Seed-OSS: a Llama with biases of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toys import VOCAB, save_model

from genssd.engine.common.errors import CheckpointError
from genssd.engine.families.family import Family
from genssd.engine.families.registry import FAMILIES
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool


def differences(config: Any) -> Mapping[str, Any]:
    return {"output_bias": bool(config.attention_out_bias), "mlp_bias": bool(config.mlp_bias)}


@pytest.mark.parametrize("out_bias", [False, True])
@torch.inference_mode()
def test_a_family_is_added_by_its_spec(tmp_path: Path, out_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path, "seed_oss", attention_bias=True, attention_out_bias=out_bias, mlp_bias=True)
    with pytest.raises(CheckpointError, match="model_type 'seed_oss' is not supported"):
        Decoder.load(tmp_path, torch.float32, torch.device("cpu"))

    # step 1 of the recipe: the spec, which says what differs from Llama
    family = Family(architecture="SeedOssForCausalLM", differences=differences)
    monkeypatch.setitem(FAMILIES, "seed_oss", family)

    # step 4: transformers' logits
    decoder = Decoder.load(tmp_path, torch.float32, torch.device("cpu"))
    runner = PagedRunner("teacher", tmp_path, decoder, PagePool.for_model(decoder, 40, 4))
    ids = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(1))
    (hidden,) = runner.extend([runner.tree.root()], [ids.tolist()])
    torch.testing.assert_close(runner.logits(hidden), model(ids[None]).logits[0], atol=1e-4, rtol=0)
