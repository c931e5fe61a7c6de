"""Sending a trained model to a repository of the Hugging Face hub.

Whether the hub would take it is asked before a training begins (`prepare_repository`). What goes wrong after it
(`upload_model`) is named together with the directory that holds the model, and loses nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

UPLOADED = (
    *("README.md", "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("additional_chat_templates/*", "adapter/*"),
)
"""Patterns of the files of a model's directory that are sent: the model and its card, and nothing of the run. A star
matches slashes as well, so no pattern begins with one: checkpoints hold files of the same names."""


def ask_hub(repository: str) -> str:
    """Return the name of the user whose token is at hand. Raises InputError where there is none, or no hub.

    Nothing is changed on the hub.
    """
    if get_token() is None:
        raise InputError(
            f"push_to_hub {repository}: this machine has no token of the hub; `hf auth login` stores one, and the "
            "variable HF_TOKEN gives one"
        )
    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:  # the libraries below raise errors of many kinds without a common base
        raise InputError(f"push_to_hub {repository}: {_describe(error)}") from None


def prepare_repository(repository: str) -> None:
    """Make sure that a model can be sent to a repository, which is made, and private, where it does not exist.

    Raises InputError where there is no token, no hub, or no right to write.
    """
    user = ask_hub(repository)
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
    except Exception as error:  # as above
        raise InputError(f"push_to_hub {repository}, as {user}: {_describe(error)}") from None


def upload_model(repository: str, directory: Path) -> None:
    """Send the model in a directory, and its card, as one commit.

    Raises InputError that names the directory, and the command which sends the model later.
    """
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=list(UPLOADED),
            commit_message="Add the model that genssd has trained",
        )
    except Exception as error:  # as above
        patterns = " ".join(f"'{pattern}'" for pattern in UPLOADED)
        raise InputError(
            f"the trained model is complete in {directory}, but was not sent to {repository}: {_describe(error)}; "
            f"`hf upload {repository} {directory} . --include {patterns}` sends it"
        ) from None


def _describe(error: Exception) -> str:
    """Return what the hub, or the way to it, says, on one line, with what to do about it."""
    response: Any = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    if response is not None and response.status_code in (401, 403):
        return f"the hub refuses the token ({one_line(error)}); it must have the right to write to this repository"
    if response is not None:
        return f"the hub answers with an error ({one_line(error)})"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is turned off by HF_HUB_OFFLINE; unset it, or leave push_to_hub out"
    return f"the hub cannot be reached ({one_line(error)}); leave push_to_hub out to work without it"
