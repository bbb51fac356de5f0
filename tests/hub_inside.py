"""The loopback Hub for code in this process: huggingface_hub has read its environment when it was imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_writing import User

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


@contextmanager
def inside(root: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub at `root` that this process's huggingface_hub talks to, with a token of 'me', who is in 'team'."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer(root) as hub:
        hub.users[TOKEN] = User("me", ("team",))
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
    close_session()


def main_inside(url: str, token: str, arguments: list[str]) -> int:
    """The command line in a process of its own that was forked from one that had read another environment."""
    import os

    from huggingface_hub import constants

    from llmcomp.cli.main import main

    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    os.environ |= {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1"}
    return main(arguments)
