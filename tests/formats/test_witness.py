"""Digests tell any two tensors apart and read back as written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmcomp.errors import RunError
from llmcomp.formats import witness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_digest_is_of_the_bytes_in_row_major_order(dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 5) * 3).to(dtype)
    wanted = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert witness.digest(tensor) == witness.Digest(wanted, (7, 5), witness.dtype_name(dtype))
    assert witness.digest(tensor.t().contiguous().t()).sha256 == wanted


def test_digest_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(33, 8)
    whole = witness.digest(tensor)
    monkeypatch.setattr(witness, "_CHUNK", 100)
    assert witness.digest(tensor) == whole


def test_one_bit_changes_the_digest() -> None:
    tensor = torch.zeros(4, 4)
    other = tensor.clone()
    other.view(torch.int32)[2, 3] = 1
    assert witness.digest(tensor).sha256 != witness.digest(other).sha256


@pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.zeros(0, 4)], ids=["scalar", "empty"])
def test_odd_shapes(tensor: torch.Tensor) -> None:
    assert witness.digest(tensor).shape == tuple(tensor.shape)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    first, second = torch.randn(3, 2), torch.randn(4).bfloat16()
    witness.record(tmp_path, "block-00000", {"a.weight": torch.zeros(9)})
    witness.record(tmp_path, "block-00000", {"a.weight": first})  # a resumed block replaces its digests
    witness.record(tmp_path, "block-00001", {"b": second})
    witness.save(
        tmp_path,
        compressed={"a": "int4 g128"},
        source={"a.weight": ((3, 2), "float32"), "b": ((4,), "bfloat16")},
        inputs={"input_ids": torch.arange(6).view(2, 3)},
        output=torch.ones(2, 3, 5),
    )
    read = witness.load(tmp_path)
    assert read.digests == {"a.weight": witness.digest(first), "b": witness.digest(second)}
    assert read.compressed == {"a": "int4 g128"}
    assert read.source["b"] == ((4,), "bfloat16")
    assert torch.equal(read.inputs["input_ids"], torch.arange(6).view(2, 3))
    assert torch.equal(read.output, torch.ones(2, 3, 5))


def test_an_incomplete_witness_is_a_failure(tmp_path: Path) -> None:
    witness.record(tmp_path, "block-00000", {"a": torch.zeros(2)})
    with pytest.raises(RunError, match="no complete witness"):
        witness.load(tmp_path)


def test_model_output_takes_the_first_known() -> None:
    logits, hidden = torch.zeros(1), torch.ones(1)
    assert witness.model_output(SimpleNamespace(logits=logits, last_hidden_state=hidden)) is logits
    assert witness.model_output(SimpleNamespace(last_hidden_state=hidden)) is hidden
    with pytest.raises(RunError, match="to compare"):
        witness.model_output(SimpleNamespace(loss=logits))
