"""One quick question to the Hub: answered, or known to be unreachable within about a second.

huggingface_hub retries for 23 s where there is no network, and a connect timeout covers neither a name server
that does not answer nor eight addresses tried one after the other. So the request runs in a thread of its
own, which is abandoned if no connection stands after `CONNECT` seconds; once it stands, the server has `READ`
seconds.
"""

from __future__ import annotations

import threading
from typing import Any

from llmcomp.errors import UserError

CONNECT = 1.0
READ = 10.0


class Unreachable(Exception):
    """No answer; says why: no network, no such host, nobody listening, too slow, or offline mode."""


def ask(url: str, *, params: dict[str, str] | None = None) -> Any:
    """GET `url` once, with the user's Hub token where there is one.

    Args:
        url: under the Hub's endpoint.
        params: of the query.

    Returns:
        The answer (`httpx2.Response`), whatever its status.

    Raises:
        UserError: a token that cannot be sent.
        Unreachable: no connection after CONNECT seconds, no answer within READ seconds, or HF_HUB_OFFLINE is
            set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, get_token

    if constants.is_offline_mode():
        raise Unreachable("HF_HUB_OFFLINE is set")
    # Not build_hf_headers: that may ask the Hub another question first, with a longer timeout.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token is not None and not token.isascii():
        raise UserError("The token for the Hub has characters that no token has; run `hf auth login`, or set HF_TOKEN.")
    headers = {"user-agent": "llmcomp", **({"authorization": f"Bearer {token}"} if token else {})}
    connected, finished = threading.Event(), threading.Event()
    outcome: dict[str, Any] = {}

    def trace(event: str, info: dict[str, Any]) -> None:
        # A kept connection is not opened again: its first event is that of the request.
        if event == "connection.connect_tcp.complete" or event.startswith("http"):
            connected.set()

    def request() -> None:
        try:
            outcome["answer"] = get_session().get(
                url, params=params, headers=headers,
                timeout=(CONNECT, READ, READ, READ), extensions={"trace": trace},
            )  # fmt: skip
        except Exception as error:  # raised again below, in the caller's thread
            outcome["error"] = error
        connected.set()
        finished.set()

    threading.Thread(target=request, daemon=True, name="llmcomp-ask").start()
    if not connected.wait(CONNECT):
        raise Unreachable(f"no connection within {CONNECT:g} s")
    if not finished.wait(2 * READ):
        raise Unreachable(f"no answer within {2 * READ:g} s")
    return _result(outcome)


def _result(outcome: dict[str, Any]) -> Any:
    import httpx2

    error = outcome.get("error")
    if isinstance(error, (httpx2.TransportError, OSError)):
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreachable(detail) from error
    if error is not None:
        raise error
    return outcome["answer"]


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or https://huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT
