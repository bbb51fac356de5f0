"""What a request to the Hub ended with: whether it may be chance, how long to wait, and one sentence for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from llmcomp.errors import LlmcompError, RunError, UserError
from llmcomp.network import Unreachable

_CHANCE = (408, 429, 500, 502, 503, 504)
_QUOTA = re.compile(r"quota|storage|limit|payment", re.IGNORECASE)


def explain(error: Exception, what: str, repo: str, kept: str, token: str) -> LlmcompError:
    """One sentence for what a request ended with, and one on what is safe."""
    status = _status(error)
    reason = reason_of(error, token)
    space = repo.split("/")[0]
    if isinstance(error, ValueError) and "README.md" in str(error):
        return UserError(f"The Hub does not accept the card: {reason}. {kept}")
    if isinstance(error, Unreachable):
        return RunError(f"The Hub cannot be reached ({reason}). {kept}")
    if status == 401:
        return UserError(f"The Hub does not accept the token ({reason}); run `hf auth login` again. {kept}")
    if status == 402 or (status in (403, 413) and _QUOTA.search(reason)):
        return UserError(f"The Hub has no room for it ({reason}); make some, or ask for more. {kept}")
    if status == 403:
        return UserError(f"The token has no right to write to {space} ({reason}); use one that has. {kept}")
    if status in (409, 412):
        return RunError(f"{repo} was changed by somebody else meanwhile ({reason}). {kept}")
    if status == 429:
        return RunError(f"The Hub takes no more requests for now ({reason}). {kept}")
    return RunError(f"The push to {repo} broke off while {what} ({reason}). {kept}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    for one in _chain(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def chance(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import httpx2

    if isinstance(error, Unreachable):
        return "HF_HUB_OFFLINE" not in str(error)
    status = _status(error)
    if status is not None:
        return status in _CHANCE
    kinds = (httpx2.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)
    return any(isinstance(one, kinds) for one in _chain(error))


def asked(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait."""
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", None)
        if headers is not None and str(headers.get("Retry-After", "")).isdigit():
            return float(headers["Retry-After"])
    return None


def reason_of(error: Exception, token: str) -> str:
    """What the Hub said, else the last cause, as one line without the token."""
    chain = list(_chain(error))
    said = next((text for one in chain if (text := getattr(one, "server_message", None))), None)
    said = str(said or chain[-1]) or type(chain[-1]).__name__
    status = _status(error)
    line = " ".join(said.split())[:300].rstrip(".")
    line = line if status is None or str(status) in line else f"{status}: {line}"
    return line.replace(token, "the token") if token else line
