"""Loading the head of a checkpoint alone: of a large model, one of its tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from genssd.engine.checkpoints.basic_config import is_supported
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.parameters import EMBEDDING, HEAD, match_parameters
from genssd.engine.checkpoints.weights import WeightFiles
from genssd.engine.checkpoints.wrappers import text_name, text_part
from genssd.engine.common.errors import CheckpointError
from genssd.engine.models.model_head import ModelHead
from genssd.engine.models.transformers_loading import logits_divisor, logits_softcap, make_empty_model


def load_head(directory: Path, dtype: torch.dtype, device: torch.device) -> ModelHead:
    """Load the head of a causal language model, [V, D], and what is done to its logits; no other weights are read.

    The head is the embedding where the checkpoint has no other. Raises CheckpointError on a directory that cannot be
    used, and where the tensor of the head is not found by its name.
    """
    model = make_empty_model(directory)
    weights = WeightFiles.open(directory)
    name = _find_name(directory, weights, model)
    weights.check_dtype(name)
    expected = tuple(model.get_output_embeddings().weight.shape)
    if weights.tensors[name].shape != expected:
        shape = weights.tensors[name].shape
        raise CheckpointError(f"{weights.tensors[name].file}: {name} has shape {shape}, config.json implies {expected}")
    with weights.reading({HEAD: name}, dtype, device) as tensors:
        return ModelHead(weight=tensors[HEAD], softcap=logits_softcap(model), divisor=logits_divisor(model))


def _find_name(directory: Path, weights: WeightFiles, model: torch.nn.Module) -> str:
    """Return the name of the head in the weight files: its own where there is one, else that of the embedding."""
    fields = read_config(directory)
    if is_supported(fields):
        stored = match_parameters(weights, ModelConfig.load(directory))
        return stored.get(HEAD) or stored[EMBEDDING]
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head]
    names.sort(key=lambda name: name.startswith(f"{model.base_model_prefix}."))  # the embedding comes last
    own = {text_name(name) if text_part(fields) else name: name for name in weights.tensors}
    found = next((own[name] for name in names if name in own), None)
    if found is None:
        raise CheckpointError(
            f"{directory}: the weights have no tensor of the head ({', '.join(names)}), which kd_states reads; leave "
            "it out, and the whole teacher is loaded"
        )
    return found
