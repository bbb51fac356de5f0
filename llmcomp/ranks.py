"""One run in several processes, on one host or on many: who they are, what they exchange, who speaks.

A launcher (torchrun, `accelerate launch --multi_gpu`) starts the same command several times and tells each process
its rank by environment variables. What the ranks exchange is here and nowhere else: sums, rows that each has made
its share of, and what rank 0 alone reads. A process of its own is a world of size 1, which exchanges nothing, so
the loop knows one way. Tensors go as bytes or sums through torch.distributed, those of CPUs by gloo, those of GPUs by
NCCL, so all ranks must give theirs on the same kind of device.

    a rank fails       → it notes its exit status where all can read it, closes its connections, says its sentence
    another one ends   → an exchange with it breaks: if a rank has noted why, end quietly with its status, else be
                         the first to say that one was lost
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from llmcomp.errors import EndedElsewhere, RankLost, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Keys of the store.
_ENDED, _HEARD, _PARTED, _RESULT, _TAKEN = "ended", "heard", "parted", "result", "taken"
_PATIENCE = timedelta(minutes=30)  # for one exchange; a rank that is slower is taken for lost
_LINGER = 10.0  # seconds that whoever says why all end waits for the others to hear it
_INTERVAL = 0.2
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_HOW = "`torchrun --nproc_per_node N -m llmcomp …` or `accelerate launch --multi_gpu --num_processes N -m llmcomp …`"


@dataclass(frozen=True)
class World:
    """The processes of one run.

    Attributes:
        rank: of this one; rank 0 writes, verifies, measures and reports. size: how many.
        store: what all ranks read and write by key, through which they have found each other.

    Its methods are called by all ranks in the same order; they raise RankLost where another one has ended.
    """

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of items that are dealt one by one."""
        return list(items[self.rank :: self.size])

    def rows(self, count: int) -> slice:
        """This rank's part of `count` rows, equal parts in order; never empty: who would have none takes the last
        row, too, and `join_rows` leaves it out."""
        piece = -(-count // self.size)
        start = min(self.rank * piece, count - 1)
        return slice(start, max(start + 1, min(start + piece, count)))

    def join_rows(self, own: Tensor, count: int) -> Tensor:
        """[count, …] from what each rank has made of its `rows(count)`."""
        if self.size == 1:
            return own
        import torch.distributed as dist

        piece = -(-count // self.size)
        sent = own.new_zeros(piece, *own.shape[1:])
        sent[: own.shape[0]] = own
        full = own.new_empty(piece * self.size, *own.shape[1:])
        with _exchanging(self.size):
            _meet_before(own)
            dist.all_gather([_bytes(part) for part in full.split(piece)], _bytes(sent))
        return full[:count]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up all ranks' tensors in place; in one order, so that all get the same bits, in every run."""
        return self._reduce(tensor, "SUM")

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks' values, element by element, in place."""
        return self._reduce(tensor, "MAX")

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return self._of_numbers(number, "SUM")

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self._of_numbers(number, "MAX")

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor; the others give one of its shape and dtype, which is overwritten."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        sent = tensor.contiguous()
        with _exchanging(self.size):
            _meet_before(sent)
            dist.broadcast(_bytes(sent), src=0)
        return tensor if self.first else sent

    def message(self, content: bytes | None) -> bytes:
        """Rank 0's bytes; the others give None."""
        if self.size == 1:
            assert content is not None
            return content
        import torch

        length = self.from_first(torch.tensor([len(content or b"")]))
        sent = torch.zeros(int(length), dtype=torch.uint8)
        if content:
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.from_first(sent).numpy().tobytes() if len(sent) else b""

    def part(self) -> None:
        """Close the connections; only `conclude` comes after it. Rank 0 goes on alone, and libraries that it loads the
        result with (compressed-tensors, for one) would wait for the others where torch.distributed is initialized."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with _exchanging(self.size):
            self._meet(_PARTED, float("inf"))
            dist.destroy_process_group()

    def conclude(self, content: bytes | None) -> bytes:
        """As `message`, where rank 0 may take hours (it verifies and measures what all have made)."""
        if self.size == 1:
            assert content is not None
            return content
        with _exchanging(self.size):
            if content is not None:
                self.store.set(_RESULT, content)
            while not self.store.check([_RESULT]):
                self._not_ended()
                time.sleep(_INTERVAL)
            found = bytes(self.store.get(_RESULT))
        with contextlib.suppress(RuntimeError, RankLost):  # the result stands, whoever has ended meanwhile
            self._meet(_TAKEN, _LINGER)
        return found

    def _meet(self, key: str, seconds: float) -> None:
        """Go on when all ranks have come here, or after some time."""
        until = time.monotonic() + seconds
        here = self.store.add(key, 1)
        while here < self.size and time.monotonic() < until:
            self._not_ended()
            time.sleep(_INTERVAL / 10)
            here = self.store.add(key, 0)

    def _not_ended(self) -> None:
        if self.store.check([_ENDED]):
            raise RankLost(_lost(self.size))

    def _of_numbers(self, number: int, operation: str) -> int:
        if self.size == 1:
            return number
        import torch

        return int(self._reduce(torch.tensor([number]), operation))

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        sent = tensor.contiguous()
        with _exchanging(self.size):
            _meet_before(sent)
            dist.all_reduce(sent, op=getattr(dist.ReduceOp, operation))
        return tensor if sent is tensor else tensor.copy_(sent)


ALONE = World()

# What this process has joined and not left: the command line joins, and the API within it.
_JOINED: ContextVar[World | None] = ContextVar("joined", default=None)


def launched(environment: Mapping[str, str] = os.environ) -> World:
    """What the launcher's environment variables say of this process. Imports nothing.

    Raises:
        UserError: a launch that became one process where several were asked for, or one that says too little.
    """
    size = environment.get("WORLD_SIZE")
    if size is None:
        if any(int(environment.get(name) or 1) > 1 for name in _MPI):
            raise UserError(f"Started by MPI, of which llmcomp knows nothing; start several processes by {_HOW}.")
        # `accelerate launch --cpu` notes where several processes would meet, and then starts a single one.
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
            raise UserError(
                "accelerate launch was asked for several processes and started only one, as it does with --cpu or a "
                f"MULTI_CPU configuration; what starts several, on CPUs too, is {_HOW}."
            )
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if int(size) > 1 and missing:
        raise UserError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes by {_HOW}.")
    return World(int(environment.get("RANK", 0)), int(size)) if int(size) > 1 else ALONE


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that this process was launched into, connected while it lasts. What is raised inside ends all ranks:
    in one of them it comes out as it is, in the others as EndedElsewhere.

    Raises:
        UserError: as `launched`, or torch.distributed is in use already.
        RankLost: another rank did not come, or ended without a word.
        EndedElsewhere: another rank has said why all end.
    """
    world = launched()
    outer = _JOINED.get()
    if world.size == 1 or outer is not None:
        yield outer or world
        return
    import torch.distributed as dist

    if dist.is_initialized():
        raise UserError(
            "torch.distributed is initialized already, which rank 0 would later wait in, alone: call llmcomp before "
            "anything that does so (such as accelerate.Accelerator), or destroy the process group first."
        )
    try:
        store = _connect(world)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(
            f"Rank {world.rank} of {world.size} could not meet the others at {where}: start all of them, with "
            f"an address that all hosts reach and a free port ({' '.join(str(error).split())[:200]})."
        ) from error
    world = replace(world, store=store)
    entered = _JOINED.set(world)
    try:
        yield world
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
        if not status:  # a command's usual end
            raise
        speaker, told = _claim(store, world, status)
        _close(store, world, speaker)
        if speaker == world.rank:
            raise
        raise EndedElsewhere(f"Rank {speaker} has ended the run; it says why.", told) from error
    finally:
        _JOINED.reset(entered)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def connected() -> Iterator[World]:
    """As `joined`, for one run after another in one command: the world that an earlier one has parted from is joined
    anew; raises as that."""
    outer = _JOINED.get()
    if outer is None or _initialized():
        with joined() as world:
            yield world
        return
    entered = _JOINED.set(None)
    try:
        with joined() as world:
            yield world
    finally:
        _JOINED.reset(entered)


def _initialized() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _connect(world: World) -> Any:
    """Initialize torch.distributed, with keys that no earlier run of these processes has used; the store of them."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    common, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    number = common.add(f"llmcomp/{world.rank}", 1)
    own = dist.PrefixStore(f"llmcomp/run-{number}", common)
    dist.init_process_group(backend, store=own, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
    return own


def _claim(store: Any, world: World, status: Any) -> tuple[int, int]:
    """(the rank that says why all end, the exit status of all): this one, unless another was first."""
    try:
        said = store.compare_set(_ENDED, "", f"{world.rank} {int(status)}").decode()
    except RuntimeError:  # whoever kept the store is gone, so nobody can be asked
        return world.rank, int(status)
    speaker, told = map(int, said.split())
    return speaker, told


def _close(store: Any, world: World, speaker: int) -> None:
    """Break the connections, so that ranks that wait for this one go on; the speaker, who may keep the store, waits
    until they have read it."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # of a store or a group that is gone already
        if dist.is_initialized():
            dist.destroy_process_group()
        heard, until = store.add(_HEARD, int(speaker != world.rank)), time.monotonic() + _LINGER
        while speaker == world.rank and heard < world.size - 1 and time.monotonic() < until:
            time.sleep(_INTERVAL / 4)
            heard = store.add(_HEARD, 0)


@contextlib.contextmanager
def _exchanging(size: int) -> Iterator[None]:
    """Turn what torch.distributed raises into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            minutes = _PATIENCE.total_seconds() / 60
            raise RankLost(
                f"Another of the {size} ranks was not heard of for {minutes:.0f} minutes; start them all again, "
                "and the same command resumes where it stopped."
            ) from error
        raise RankLost(_lost(size)) from error


def _lost(size: int) -> str:
    return (
        f"Another of the {size} ranks has ended without a word (killed, or out of memory); the same command "
        "resumes where it stopped."
    )


def _meet_before(tensor: Tensor) -> None:
    """Before an exchange between GPUs, one between CPUs: NCCL waits in the GPU for a rank that has ended, and is heard
    of after half an hour, while gloo's connection breaks at once."""
    if tensor.device.type != "cpu":
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1))


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8: whatever the dtype, gloo copies it."""
    import torch

    return tensor.flatten().view(torch.uint8)
