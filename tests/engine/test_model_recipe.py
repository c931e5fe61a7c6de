"""The recipe "add a model family" of docs/recipes.md, followed for Mistral: a Llama whose windows are always on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.toys import CLASSES, VOCAB, edit_json, save_model
from transformers import MistralConfig, MistralForCausalLM

from genssd.engine import config
from genssd.engine.errors import CheckpointError
from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool
from genssd.engine.runner import ModelRunner


@pytest.mark.parametrize("window", [None, 9])
@torch.inference_mode()
def test_a_family_is_added_by_its_config(tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "mistral", (MistralConfig, MistralForCausalLM))
    model = save_model(tmp_path, "mistral", sliding_window=window)
    with pytest.raises(CheckpointError, match="model_type 'mistral' is not supported"):
        Decoder.load(tmp_path, torch.float32, torch.device("cpu"))

    # step 1 of the recipe: the type, and what differs from Llama; here the test says it in the checkpoint's own config
    monkeypatch.setitem(config.ARCHITECTURES, "mistral", "MistralForCausalLM")
    edit_json(tmp_path / "config.json", use_sliding_window=window is not None, max_window_layers=0)

    # step 4: transformers' logits
    decoder = Decoder.load(tmp_path, torch.float32, torch.device("cpu"))
    runner = ModelRunner("teacher", tmp_path, decoder, PagePool.for_model(decoder, 40, 4))
    ids = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(1))
    (hidden,) = runner.extend([runner.tree.root()], [ids.tolist()])
    torch.testing.assert_close(runner.logits(hidden), model(ids[None]).logits[0], atol=1e-4, rtol=0)
