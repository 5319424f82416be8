"""What clients of OpenAI-compatible servers share: the address, and the key, which nothing but headers may hold."""

import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from recap.errors import UserError

KEY = "OPENAI_API_KEY"
CONNECT_TIMEOUT = 10.0


def client_options(server: str, where: str) -> dict[str, Any]:
    """Options of `openai.OpenAI` and `openai.AsyncOpenAI`. The key, where one is set, goes to this server only.

    Args:
        server: its address, `http://HOST:PORT/v1`.
        where: the experiment file says it, for messages.

    Raises:
        UserError: openai is not installed, or the address is none.
    """
    check_address(server, where)
    if find_spec("openai") is None:
        raise UserError(f"{where} needs openai: pip install 'recap-t2i[server]'")
    return {"base_url": server, "api_key": os.environ.get(KEY) or "none"}  # without one, openai makes no client


def request_headers() -> dict[str, Any]:
    """Of every request: without a key there is none of it."""
    import openai
    return {} if os.environ.get(KEY) else {"Authorization": openai.Omit()}


def check_address(server: str, where: str) -> None:
    """Raise UserError for what is no address of a server, or says more than where it is."""
    address = urlsplit(server)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"{where}: {server} is not an address: write http://HOST:PORT/v1")
    if "@" in address.netloc or address.query:  # it is written to files and shown in messages
        raise UserError(f"{where}: an address holds no password and no key: set {KEY} in the environment")


def without_key(text: str) -> str:
    """A text as it may be shown and kept; what servers answer may quote the key."""
    key = os.environ.get(KEY)
    return text.replace(key, "…") if key else text
