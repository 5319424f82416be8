"""What clients of OpenAI-compatible servers share: the address, and the key, which nothing but headers may hold."""

import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from recap.errors import UserError

KEY = "OPENAI_API_KEY"
CONNECT_TIMEOUT = 10.0
SHORTEST_KEY = 8
"""One that is shorter is no secret (`none`, `EMPTY`), and words hold it."""


def client_options(server: str, where: str) -> dict[str, Any]:
    """Options of `openai.OpenAI` and `openai.AsyncOpenAI`. The key, where one is set, goes to this server only.

    Args:
        server: its address, `http://HOST:PORT/v1`.
        where: the experiment file says it, for messages.

    Raises:
        UserError: openai is not installed, or the address is none.
    """
    check_address(server, where)
    if not _key().isascii() or not (_key() or "x").isprintable() or " " in _key():
        raise UserError(f"{where}: {KEY} in the environment holds characters that no key has: set it anew")
    if find_spec("openai") is None:
        raise UserError(f"{where} needs openai: pip install 'recap-t2i[server]'")
    return {"base_url": server, "api_key": _key() or "none"}  # without one, openai makes no client


def request_headers() -> dict[str, Any]:
    """Of every request: without a key there is none of it."""
    import openai
    return {} if _key() else {"Authorization": openai.Omit()}


def _key() -> str:
    """Of the environment; what surrounds it there, a line's end often, is no part of it."""
    return os.environ.get(KEY, "").strip()


def check_address(server: str, where: str) -> None:
    """Raise UserError for what is no address of a server, or says more than where it is."""
    if any(mark in server for mark in "@?#"):  # it is written to files and shown in messages
        raise UserError(f"{where}: an address holds no password and no key: set {KEY} in the environment")
    try:
        address = urlsplit(server)
        is_one = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        (address.hostname or "").encode("idna")
    except ValueError:  # a port that is none, a bracket without its other, a name that can't be written
        is_one = False
    if not is_one:
        raise UserError(f"{where}: {server} is not an address: write http://HOST:PORT/v1")


def without_key(text: str) -> str:
    """A text as it may be shown and kept; what servers answer may quote the key."""
    return text.replace(_key(), "…") if len(_key()) >= SHORTEST_KEY else text
