"""The address of a server with an OpenAI-compatible API, as users give it: `http://host:8000/v1`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from genssd.engine.common.errors import InputError

SCHEMES = ("http", "https")
KEY_VARIABLES = ("GENSSD_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the server's API key, the first one that is set counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is; `url` is what messages and records show."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    """Path before `/models` and `/completions`, such as "/v1"."""


def is_url(name: object) -> bool:
    """Return whether the name of a model is the URL of a server."""
    return isinstance(name, str) and name.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def parse_url(url: str) -> Address:
    """Return the parts of a server's URL.

    Raises InputError on a URL without a host, and on one with a password, a query or a fragment: URLs are recorded.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"the URL of the server cannot be read: {error}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"the URL of the server at {host} holds a password, a query or a fragment, and URLs are recorded: give "
            f"{parts.scheme}://HOST:PORT/v1 alone, and the key by the environment variable {KEY_VARIABLES[0]}"
        )
    if not host:
        raise InputError(f"{url} names no host; a server is given as http://HOST:PORT/v1")
    scheme = parts.scheme.lower()
    return Address(
        url=url.rstrip("/"),
        scheme=scheme,
        host=host,
        port=port or (443 if scheme == "https" else 80),
        path=parts.path.rstrip("/"),
    )
