"""What `evals.quality` compares: tools, settings, and the models and texts that they are measured on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.peers.arguments import CUTTING, FACTORS, PRUNING, TOGETHER
from evals.setup_peers import peer_python

OURS = "llmcomp"
AUTO = "llmcomp auto"  # where it was measured, it is what stands against the peers
LEARNED = "llmcomp gptq-signround"  # slow; asked for by name


@dataclass(frozen=True)
class Tool:
    """A tool and one of its methods, and how its checkpoint is opened."""

    name: str
    package: str
    method: str
    loader: str = "transformers"

    @property
    def python(self) -> Path:
        """The interpreter that has the tool."""
        return Path(sys.executable) if self.package == OURS else peer_python(self.package)


@dataclass(frozen=True)
class Setting:
    """Bits and group size of the linear layers (None: one scale per output channel), or the pattern by which weights
    are removed: '2:4', or a share."""

    name: str
    bits: int = 16
    group_size: int | None = None
    pattern: str | None = None
    ratio: float | None = None  # of bytes that factors keep
    cut: str | None = None  # what is pruned, as llmcomp's flags say it


@dataclass(frozen=True)
class Part:
    """A model, the texts or sentences it is measured on, and the settings compared; `ours`: the tool that stands
    against the best of the others, where all are llmcomp's."""

    name: str
    task: str
    model: str
    texts: dict[str, str]
    settings: tuple[Setting, ...]
    tools: tuple[str, ...]
    ours: str | None = None


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("llmcomp", OURS, "gptq"),
        Tool(AUTO, OURS, "auto"),
        Tool("llmcomp gptaq", OURS, "gptaq"),
        Tool("llmcomp awq", OURS, "awq"),
        Tool("llmcomp awq-gptq", OURS, "awq-gptq"),
        Tool(LEARNED, OURS, "gptq-signround"),
        *(Tool(f"llmcomp {method}", OURS, method) for method in PRUNING),
        *(Tool(f"llmcompressor {method}", "llmcompressor", method) for method in ("sparsegpt", "wanda")),
        *(Tool(f"llmcomp {method}", OURS, method) for method in (*FACTORS, *CUTTING)),
        Tool("llmcomp one sweep", OURS, "one-sweep"),
        Tool("llmcomp alps, gptq", OURS, "alps-gptq"),
        Tool("llmcomp two steps", OURS, "two-steps"),
        Tool("llmcompressor two steps", "llmcompressor", "two-steps"),
        Tool("llmcompressor gptq", "llmcompressor", "gptq"),
        Tool("llmcompressor gptq-mse", "llmcompressor", "gptq-mse"),
        Tool("llmcompressor awq", "llmcompressor", "awq"),
        Tool("llmcompressor awq-gptq", "llmcompressor", "awq-gptq"),
        Tool("llmcompressor rtn-mse", "llmcompressor", "rtn-mse"),
        Tool("auto-round", "auto_round", "signround", "auto_round"),
        Tool("gptqmodel gptq", "gptqmodel", "gptq", "gptqmodel"),
        Tool("gptqmodel gptq-mse", "gptqmodel", "gptq-mse", "gptqmodel"),
    )
}


def lm(name: str, settings: tuple[Setting, ...], tools: tuple[str, ...], ours: str | None = None) -> Part:
    """A part on the small trained decoder: the books are its domain, WikiText is not."""
    texts = {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"}
    return Part(name, "causal-lm", "models/lm", texts, settings, tools, ours)


def sst2(name: str, settings: tuple[Setting, ...], tools: tuple[str, ...], ours: str | None = None) -> Part:
    """A part on the small sentiment classifier."""
    texts = {"sst2": "data/sst2/test.jsonl"}
    return Part(name, "classification", "models/minilm-sst2", texts, settings, tools, ours)


def cuts(*flags: str) -> tuple[Setting, ...]:
    """Settings of what `llmcomp prune` removes, by its flags."""
    return tuple(Setting(what.strip("-"), cut=what) for what in flags)


def by(*methods: Sequence[str]) -> tuple[str, ...]:
    """Names of the tools that have one of these methods."""
    return tuple(name for name, tool in TOOLS.items() if tool.method in [one for some in methods for one in some])


INTEGERS = (
    Setting("4-bit g128", 4, 128), Setting("4-bit channel", 4, None), Setting("3-bit g128", 3, 128),
    Setting("2-bit g64", 2, 64),
)  # fmt: skip
PATTERNS = {
    name: Setting(name, pattern=pattern)
    for name, pattern in {"2:4": "2:4", "4:8": "4:8", "50%": "0.5", "70%": "0.7"}.items()
}
RATIOS = tuple(Setting(f"ratio {ratio}", ratio=ratio) for ratio in (0.8, 0.6, 0.4))
PARTS = {
    part.name: part
    for part in (
        lm(
            "lm", INTEGERS,
            tuple(
                name for name, tool in TOOLS.items()
                if "rtn" not in name and name != LEARNED and name not in by(PRUNING, FACTORS, CUTTING, TOGETHER)
            ),
        ),
        lm("lm-sparse", tuple(PATTERNS.values()), by(PRUNING)),
        lm("lm-together", (Setting("2:4 + INT4 g128", 4, 128, "2:4"),), by(TOGETHER), "llmcomp one sweep"),
        lm("lm-lowrank", RATIOS, by(FACTORS), "llmcomp svd-llm-update"),
        lm(
            "lm-pruned", cuts("--mlp 0.125", "--mlp 0.25", "--mlp 0.5", "--heads 0.5", "--layers 1", "--layers 2"),
            by(CUTTING), "llmcomp cut",
        ),
        sst2("sst2-sparse", tuple(PATTERNS[name] for name in ("2:4", "50%", "70%")), by(PRUNING)),
        sst2("sst2-lowrank", RATIOS, by(FACTORS), "llmcomp svd-llm-update"),
        sst2("sst2-pruned", cuts("--mlp 0.25", "--mlp 0.5", "--layers 1"), by(CUTTING), "llmcomp cut"),
        # gptqmodel has no definition of BERT: it refuses the model.
        sst2(
            "sst2", (Setting("4-bit g128", 4, 128), Setting("8-bit channel", 8, None)),
            ("llmcomp", "llmcompressor gptq", "llmcompressor gptq-mse"),
        ),
    )
}  # fmt: skip
