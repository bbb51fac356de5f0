"""Adapter: what the rest of llmcomp knows of one Hugging Face model's structure. It holds no weights.

Found by `llmcomp.adapters.discover.discover` on a model whose parameters live on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from llmcomp.errors import UnknownArchitecture


@dataclass(frozen=True)
class LinearRef:
    """One compressible weight.

    Attributes:
        name: full module name in the model, such as 'model.layers.0.self_attn.q_proj'.
        role: attention, mlp, embeddings or head.
        block: index of the block it belongs to, None outside of the blocks.
        out_features, in_features: of the weight as methods see it, [out, in].
        transposed: the module stores [in, out] (GPT-2's Conv1D).
        share: of the tokens, how many are expected to reach it; less than 1 for one of several experts.
    """

    name: str
    role: str
    block: int | None
    out_features: int
    in_features: int
    transposed: bool = False
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        stages: its linears in the order of computation, those that read the same input tensor together
            (q/k/v; gate/up; all five where attention and MLP run side by side).
        applications: how often in a row the model runs it, more than once where layers are shared (ALBERT).
        lasting: names of linears that are computed, or computed again, after the next stage has begun: the MLP
            of a parallel block waits for the attention's output.
    """

    index: int
    name: str
    stages: tuple[tuple[LinearRef, ...], ...]
    applications: int = 1
    lasting: frozenset[str] = frozenset()

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        return tuple(ref for stage in self.stages for ref in stage)


@dataclass(frozen=True)
class Adapter:
    """The structure of one model.

    Attributes:
        model: the transformers model, every parameter on the meta device.
        config: its config.
        task: 'causal-lm', 'masked-lm', 'sequence-classification', 'token-classification',
            'question-answering', 'encoder' (no head), 'seq2seq-lm', 'image-classification' …
        blocks: in the order of computation; of an encoder-decoder the encoder's come first.
        embeddings: the token embedding, None where there is none, or encoder and decoder share it.
        head: the output embedding of a language model, None where there is none.
        ties: {parameter name: name of the parameter it shares storage with}, such as
            {'lm_head.weight': 'model.embed_tokens.weight'}.
        uncompressed: linears and other matrices that no role claims (poolers, classifiers, fused experts):
            name → why.
        sample_tokens: of an image or a stretch of sound, how many tokens its blocks read; None for text.
        trace_problem: why the model's forward could not be run on meta tensors, None when it could. Stages
            are then one linear each, in the order of the modules.
    """

    model: nn.Module
    config: Any
    task: str
    blocks: tuple[Block, ...]
    embeddings: LinearRef | None
    head: LinearRef | None
    ties: dict[str, str]
    uncompressed: dict[str, str]
    sample_tokens: int | None = None
    trace_problem: str | None = None

    # A mixture of experts has tens of thousands of linears, each of which is asked for.
    @cached_property
    def _block_names(self) -> dict[str, int]:
        return {block.name: block.index for block in self.blocks}

    @cached_property
    def _by_name(self) -> dict[str, LinearRef]:
        return {ref.name: ref for ref in self.refs}

    @property
    def stages_known(self) -> bool:
        """Whether stages come from the computation itself, not from the order of the modules."""
        return self.trace_problem is None

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def refs(self) -> tuple[LinearRef, ...]:
        """Every compressible weight: embeddings, then blocks in order, then the head."""
        inside = tuple(ref for block in self.blocks for ref in block.linears)
        around = (self.embeddings, *inside, self.head)
        return tuple(ref for ref in around if ref is not None)

    def block_of(self, parameter: str) -> int | None:
        """Index of the block that a parameter or buffer name belongs to, None outside of the blocks."""
        outer = parameter.rpartition(".")[0]
        while outer and outer not in self._block_names:
            outer = outer.rpartition(".")[0]
        return self._block_names.get(outer)

    def ref(self, name: str) -> LinearRef:
        """The compressible weight called `name`.

        Raises:
            UnknownArchitecture: there is none.
        """
        if name in self._by_name:
            return self._by_name[name]
        raise UnknownArchitecture(f"{self.architecture} has no compressible module called {name}.")
