"""How library code says where it stands. It never prints: it calls one of these; the CLI draws them."""

from __future__ import annotations

from typing import Protocol

from llmcomp.report.schema import LayerReport


class Progress(Protocol):
    """What a listener must offer. All methods return at once."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase ('calibrate', 'verify', 'evaluate' …) begins; `total` steps are known to come, or not."""

    def step(self, done: int = 1) -> None:
        """`done` more steps of the phase are finished."""

    def layer(self, layer: LayerReport) -> None:
        """A linear has been compressed."""

    def note(self, text: str) -> None:
        """One sentence that a user should see: which data was taken, what fell back, what was resumed."""


class Silent:
    """Listens to nothing."""

    def phase(self, name: str, total: int | None = None) -> None: ...

    def step(self, done: int = 1) -> None: ...

    def layer(self, layer: LayerReport) -> None: ...

    def note(self, text: str) -> None: ...
