"""Two students that learn from each other while both are trained (deep mutual learning, arXiv:1706.00384).

The second is a module of the first while that is trained, as projections are, so optimizer, training states and DDP
know its weights; it reads what the first one reads, in the same forward, and is taken off before anything is written.
For each of them the other is a teacher like any: a function that says what it has just computed, as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from llmcomp.training.distilling import Guide, Targets

PEER = "llmcomp_peer"


class Pair:
    """A student with a second one on it, until `leave`.

    Attributes:
        second: what the second one said of the last batch [..., classes], with its gradient.
    """

    def __init__(self, student: nn.Module, peer: nn.Module) -> None:
        self.student = student
        self.second: Tensor | None = None
        self._first: Tensor | None = None
        student.add_module(PEER, peer)
        self._handle = student.register_forward_hook(self._speak, with_kwargs=True)

    def _speak(self, module: nn.Module, given: Any, named: dict[str, Any], output: Any) -> Any:
        second: Tensor = getattr(module, PEER)(*given, **named).logits
        self.second, self._first = second, output["logits"].detach()
        output["logits"] = output["logits"] + 0.0 * second.sum()  # DDP takes for unused what outputs do not depend on
        return output

    def teachers(self) -> tuple[Guide, Guide]:
        """The first student's teacher, which is the second one, and the second one's."""

        def second(inputs: Mapping[str, Tensor]) -> Targets:
            assert self.second is not None
            return Targets(self.second.detach())

        def first(inputs: Mapping[str, Tensor]) -> Targets:
            assert self._first is not None
            return Targets(self._first)

        return second, first

    def loss(
        self, of: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]
    ) -> Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]:
        """A loss of the second student's logits, as one that is added to the first's."""

        def found(logits: Tensor, batch: Mapping[str, Tensor], counts: Tensor | None) -> Tensor:
            assert self.second is not None
            return of(self.second, batch, counts)

        return found

    def leave(self) -> None:
        """Take the second one off."""
        self._handle.remove()
        delattr(self.student, PEER)
