"""The command line that all tools share, and the windows file they read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from evals.peers.arguments import parse, rows

REQUIRED = ["--model", "m", "--windows", "w", "--output", "o"]


def test_group_size_is_a_number_or_channel():
    assert parse(REQUIRED).group_size == 128
    assert parse([*REQUIRED, "--group-size", "64"]).group_size == 64
    assert parse([*REQUIRED, "--group-size", "channel"]).group_size is None


@pytest.mark.parametrize("bad", ["0", "-1", "row", "1.5"])
def test_other_group_sizes_are_refused(bad, capsys):
    with pytest.raises(SystemExit):
        parse([*REQUIRED, "--group-size", bad])
    assert "group" in capsys.readouterr().err


def test_extra_words_keep_their_dashes():
    assert parse([*REQUIRED, "--extra=--no-verify", "--extra=-q"]).extra == ("--no-verify", "-q")


def test_rows_lose_their_padding(tmp_path):
    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 8, 9]])  # token 0 inside a row is a token
    save_file({"input_ids": ids}, tmp_path / "plain")
    save_file(
        {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [1] * 4])}, tmp_path / "padded"
    )
    assert rows(tmp_path / "plain") == [[5, 6, 0, 0], [7, 0, 8, 9]]
    assert rows(tmp_path / "padded") == [[5, 6], [7, 0, 8, 9]]
