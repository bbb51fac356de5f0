"""Waiting tensors in memory-mapped files: the same objects, the same values, all views together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmcomp.calibration.parking import Parking


def mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def group(tensor: Tensor) -> list[Tensor]:
    return [tensor] if tensor._base is None else [tensor, tensor._base]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_parked_tensors_are_the_same_objects_with_the_same_values_in_a_file(
    tmp_path: Path, dtype: torch.dtype, strided: bool
) -> None:
    tensor = torch.randn(3, 7, 16).to(dtype)
    tensor = tensor.transpose(0, 1) if strided else tensor
    values, parking = tensor.clone(), Parking(tmp_path, budget=0)
    parking.park([group(tensor)])
    assert mapped(tensor)
    assert torch.equal(tensor, values)
    assert tensor.dtype == dtype
    assert parking.spilled == tensor.numel() * dtype.itemsize
    assert list(tmp_path.iterdir()) == []  # without a name, so a kill leaves nothing
    parking.park([group(tensor)])  # what is in a file already stays there
    assert parking.spilled == tensor.numel() * dtype.itemsize
    assert torch.equal(tensor, values)


def test_the_budget_holds_for_what_lives_and_the_oldest_go_first(tmp_path: Path) -> None:
    parking, nbytes = Parking(tmp_path, budget=2 * 400), 400
    first, second, third = (torch.randn(100) for _ in range(3))
    values = [tensor.clone() for tensor in (first, second, third)]
    parking.park([[first]])
    parking.park([[second]])
    assert parking.spilled == 0
    parking.park([[second]])  # a second look at the same tensor costs nothing
    assert parking.spilled == 0
    parking.park([[third]])
    assert [mapped(tensor) for tensor in (first, second, third)] == [True, False, False]
    assert parking.spilled == nbytes
    assert all(torch.equal(a, b) for a, b in zip((first, second, third), values, strict=True))
    del second, third
    fourth, fifth = torch.randn(100), torch.randn(100)
    parking.park([[fourth]])
    parking.park([[fifth]])
    assert not mapped(fourth)
    assert not mapped(fifth)
    assert parking.spilled == nbytes


def test_all_views_of_a_storage_move_together_and_stay_views(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    row, turned = base[2], base.t()
    values = base.clone()
    Parking(tmp_path, budget=0).park([[base, row, turned]])
    assert mapped(base) and mapped(row) and mapped(turned)
    assert torch.equal(base, values) and torch.equal(row, values[2]) and torch.equal(turned, values.t())
    assert turned.stride() == (1, 8)
    row.zero_()
    assert not base[2].any() and not turned[:, 2].any()


def test_a_storage_that_somebody_else_shares_stays_where_it_is(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    other, parking = base.view(-1), Parking(tmp_path, budget=0)
    parking.park([[base]])
    assert parking.spilled == 0 and not mapped(base)
    other.zero_()
    assert not base.any()


def test_a_file_whose_tensors_are_gone_is_used_again(tmp_path: Path) -> None:
    parking = Parking(tmp_path, budget=0)
    first = torch.randn(100)
    parking.park([[first]])
    at = first.data_ptr()
    view = first[10:]
    del first
    second = torch.randn(100)
    parking.park([[second]])
    assert second.data_ptr() != at, "a view of the first still reads its file"
    del view
    third = torch.randn(100)
    values = third.clone()
    parking.park([[third]])
    assert third.data_ptr() == at
    assert torch.equal(third, values)


def test_a_directory_that_is_gone_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        Parking(tmp_path / "absent", budget=0).park([[torch.randn(4)]])
