"""Where a run computes, and that the GPU which tests pretend refuses what a real one refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend import PretendGPU, pretend_gpu
from safetensors.torch import save

from llmcomp import devices
from llmcomp.devices import CPU, choose, computing_on, describe
from llmcomp.errors import UserError

TWO_HERE = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("name", "gpus", "size", "environment", "found"),
    [
        ("auto", 0, 1, {}, "cpu"),
        ("auto", 2, 1, {}, "cuda:0"),
        ("auto", 2, 1, {"LOCAL_RANK": "1"}, "cuda:0"),  # one process, whatever the shell still holds
        ("auto", 2, 4, TWO_HERE, "cuda:1"),  # two hosts
        ("auto", 1, 2, TWO_HERE, "cpu"),  # one GPU cannot serve both
        ("cpu", 2, 1, {}, "cpu"),
        ("cuda", 1, 1, {}, "cuda:0"),
        ("cuda", 2, 2, TWO_HERE, "cuda:1"),
        ("cuda:1", 2, 1, {}, "cuda:1"),
    ],
)
def test_who_takes_which(
    name: str, gpus: int, size: int, environment: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_visible", lambda: gpus)
    assert choose(name, size, environment) == torch.device(found)


@pytest.mark.parametrize(
    ("name", "gpus", "size", "said"),
    [
        ("gpu", 1, 1, "'gpu' is none of auto, cpu, cuda and cuda:N"),
        ("cuda:", 1, 1, "none of auto"),
        ("cuda", 0, 1, "sees no CUDA GPU here"),
        ("cuda:0", 0, 1, "sees no CUDA GPU here"),
        ("cuda:2", 2, 1, "means GPU 2 here, but torch sees 2"),
        ("cuda", 1, 2, "means GPU 1 here, but torch sees 1"),
        ("cuda:0", 2, 2, "one GPU for 2 processes"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    name: str, gpus: int, size: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_visible", lambda: gpus)
    with pytest.raises(UserError, match=said):
        choose(name, size, TWO_HERE)


def test_a_report_names_the_gpu_and_not_which_of_like_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert describe(CPU) == "cpu"
    assert describe(torch.device("cuda", 1)) == "cuda (NVIDIA H100)"


@pytest.fixture
def tf32() -> Iterator[list[Any]]:
    """What a program that has turned TF32 on leaves behind."""
    backends: Any = torch.backends
    operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [one.fp32_precision for one in operations]
    for one in operations:
        one.fp32_precision = "tf32"
    yield operations
    for one, was in zip(operations, before, strict=True):
        one.fp32_precision = was


def test_a_gpu_computes_float32_in_float32(tf32: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def entering(device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", entering)
    with pytest.raises(ZeroDivisionError), computing_on(torch.device("cuda", 1)):
        assert [one.fp32_precision for one in tf32] == ["ieee"] * 3
        _ = 1 / 0
    assert [one.fp32_precision for one in tf32] == ["tf32"] * 3
    assert entered == [torch.device("cuda", 1)]
    with computing_on(CPU):
        assert [one.fp32_precision for one in tf32] == ["tf32"] * 3


# --- the pretended GPU ---


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there @ here,
        lambda there, here: here + there,
        lambda there, here: there.add_(here),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.nn.functional.linear(here, there),
        lambda there, here: torch.where(here > 0, there, 0.0),
        lambda there, here: there.__setitem__(slice(0, 1), here[:1]),
        lambda there, here: there.view(-1) + here.view(-1),
        lambda there, here: torch.nn.Parameter(there, requires_grad=False) * here,
        lambda there, here: there.new_ones(2, 2) + here,
        lambda there, here: torch.zeros(2, 2, device="cuda") + here,
        lambda there, here: there.numpy(),
        lambda there, here: there.data_ptr(),
        lambda there, here: save({"there": there}),
        lambda there, here: torch.randn(2, device="cuda", generator=torch.Generator()),
    ],
)
def test_it_refuses_what_a_gpu_refuses(mixed: Callable[[Any, Any], Any]) -> None:
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match=r"same device|host memory|generator"):
        mixed(torch.ones(2, 2).to("cuda"), torch.ones(2, 2))


def test_it_takes_what_a_gpu_takes() -> None:
    here = torch.arange(4.0).reshape(2, 2)
    with PretendGPU() as gpu:
        there = here.to(gpu.device)
        assert there.device == gpu.device and there.is_cuda and not here.is_cuda
        assert there.untyped_storage().data_ptr() != here.untyped_storage().data_ptr()
        assert (there * torch.tensor(2.0)).is_cuda  # a single number
        assert torch.equal((there @ there).cpu(), here @ here)
        assert there.copy_(here + 1).is_cuda and torch.equal(there.cpu(), here + 1)
        back = torch.empty(2, 2).copy_(there)
        assert not back.is_cuda and not there.cpu().is_cuda and there.cpu().numpy().shape == (2, 2)
        row = there[0]
        there.data = there.cpu()  # as waiting tensors are moved; views of the old memory stay where they are
        assert not there.is_cuda and row.is_cuda
        assert torch.empty_like(row, device="meta").is_meta and not torch.empty_like(row, device="cpu").is_cuda
        assert float(row.sum()) == 3 and row.tolist() == [1, 2]
        assert "matmul" in {name.strip("_") for name in gpu.calls}
