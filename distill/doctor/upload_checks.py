"""Check of the Hugging Face hub, for commands that send their model there."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.runs.hub_upload import ask_hub
from genssd.distill.train.config import TrainConfig
from genssd.engine.common.errors import InputError


def check_upload(inputs: Inputs) -> list[Finding]:
    """Find whether the hub knows the token of this machine. Nothing is changed on it."""
    config = inputs.settings.config
    repository = config.push_to_hub if isinstance(config, TrainConfig | DistillConfig) else None
    if repository is None:
        return []
    try:
        user = ask_hub(repository)
    except InputError as error:
        fix = "store a token with `hf auth login`, or leave push_to_hub out and send the model later with `hf upload`"
        return [Finding(name="hub", level="error", line=str(error), fix=fix)]
    return [Finding(name="hub", level="ok", line=f"the model goes to {repository}, as {user}")]
