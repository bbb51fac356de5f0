"""What a forecast of memory is made of: its terms, its moment, and the batches that calibration comes in."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from llmcomp.pipeline.job import TOKENS_PER_BATCH

# What the first forward leaves behind: modules that torch and transformers import as it runs, thread pools,
# scratch. Measured on a small BERT, a small Llama and a block of a large one.
ALLOCATOR = 8 * 2**20


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes at one moment of the run.

    Attributes:
        statistics: the Gram matrix of one stage, float32 [in, in] (`GramAccumulator`).
        widening: float32 copies of inputs that wait for one product with all of them (`GramAccumulator`).
        method: what solving needs beside that: chunks of the sweep or of losses, of the search, tiles.
        stacked: weights of a stage that share an input, copied side by side (`solve_stage`).
        values: int8 integers of the stage.
        installed: dense decoded weights that lanes compute with (`_solve`), with the copy that decodes one.
        packed: finished tensors of the block, waiting for its shard (`Finished`).
        parked: lanes' inputs that stay within --activation-memory (`Parking`).
        held: what else the lanes' frames refer to (queries, residual sums, masks, rotary tables).
        step: one lane's forward between two stops, at its peak.
        logits: the witness's, where the head is computed.
        learning: weights of a block in float32 with their offsets and gradients, and autograd's graph of one lane,
            where the block is tuned as a whole (`tuning`).
        kernels: compiled by oneDNN for each shape of the solver's products, where it serves them.
        allocator: of torch and the C library, whatever the model.
    """

    statistics: int = 0
    widening: int = 0
    method: int = 0
    stacked: int = 0
    values: int = 0
    installed: int = 0
    packed: int = 0
    parked: int = 0
    held: int = 0
    step: int = 0
    logits: int = 0
    learning: int = 0
    kernels: int = 0
    allocator: int = ALLOCATOR

    @property
    def total(self) -> int:
        return int(sum(astuple(self)))


@dataclass(frozen=True)
class Footprint:
    """Bytes in memory at the worst moment, `terms` by name; `spilled`: the most that waits in mapped files."""

    moment: str
    terms: MemoryTerms
    spilled: int


@dataclass(frozen=True)
class Lanes:
    """How calibration tokens are batched: `count` lanes of `rows` windows of `length` tokens, in each of `ranks`
    processes that share the work."""

    count: int
    rows: int
    length: int
    ranks: int = 1

    @classmethod
    def of(cls, samples: int, length: int, ranks: int = 1, *, tokens: int = TOKENS_PER_BATCH) -> Lanes:
        """As `calibration.data.batches` groups a rank's share of `samples` windows of one length.

        Args:
            tokens: of one batch at most, `Plan.tokens_per_batch`.
        """
        share = -(-samples // ranks)
        rows = min(share, max(1, tokens // length))
        return cls(-(-share // rows), rows, length, ranks)

    @property
    def tokens(self) -> int:
        return self.rows * self.length
