"""Names of models: local directories and hub ids, told apart without anything large being imported."""

from __future__ import annotations

from pathlib import Path

from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import quote

GGUF_STEP = (
    "GGUF is not read; take the checkpoint from which it was converted, or let transformers convert it: "
    "from_pretrained(DIRECTORY, gguf_file=NAME) of AutoModelForCausalLM and AutoTokenizer, then save_pretrained"
)
"""Step that helps where a model is a GGUF file."""
STEPS = {
    ".gguf": GGUF_STEP,
    ".bin": "pickles are never read; save the model with safetensors and give the directory",
    ".pt": "pickles are never read; save the model with safetensors and give the directory",
    ".pth": "pickles are never read; save the model with safetensors and give the directory",
    ".safetensors": "give the directory that holds it together with config.json and the tokenizer",
}
"""Step that helps where a model is given as one file, by the file's ending."""


def find_directory(name_or_path: str | Path) -> Path | None:
    """Return the local directory that a model's name means; None where it can only be a hub id.

    Raises CheckpointError where it is neither.
    """
    name = str(name_or_path)
    if is_url(name):
        raise CheckpointError(
            f"{name} is the URL of a server, which can be the teacher that writes in select, generate and distill; "
            "here the weights themselves are needed: give a hub id or a local directory"
        )
    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        is_file = path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, a home directory of nobody
        raise CheckpointError(f"model directory {quote(name)} does not exist") from None
    if is_file and path.suffix in STEPS:
        raise CheckpointError(f"{name} is a file, not a model directory: {STEPS[path.suffix]}")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"model directory {name} does not exist")
    return None
