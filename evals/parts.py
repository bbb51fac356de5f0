"""What `evals.quality` compares: tools, settings, and the models and texts that they are measured on."""

from __future__ import annotations

import sys
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
PARTS = {
    "lm": Part(
        "lm",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        (
            Setting("4-bit g128", 4, 128),
            Setting("4-bit channel", 4, None),
            Setting("3-bit g128", 3, 128),
            Setting("2-bit g64", 2, 64),
        ),
        tuple(
            name for name, tool in TOOLS.items()
            if "rtn" not in name and name != LEARNED and tool.method not in (*PRUNING, *FACTORS, *CUTTING, *TOGETHER)
        ),
    ),
    "lm-sparse": Part(
        "lm-sparse",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        (
            Setting("2:4", pattern="2:4"),
            Setting("4:8", pattern="4:8"),
            Setting("50%", pattern="0.5"),
            Setting("70%", pattern="0.7"),
        ),
        tuple(name for name, tool in TOOLS.items() if tool.method in PRUNING),
    ),
    "lm-together": Part(
        "lm-together",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        (Setting("2:4 + INT4 g128", 4, 128, "2:4"),),
        ("llmcomp one sweep", "llmcomp two steps", "llmcompressor two steps"),
        "llmcomp one sweep",
    ),
    "lm-lowrank": Part(
        "lm-lowrank",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        tuple(Setting(f"ratio {ratio}", ratio=ratio) for ratio in (0.8, 0.6, 0.4)),
        tuple(f"llmcomp {method}" for method in FACTORS),
        "llmcomp svd-llm-update",
    ),
    "lm-pruned": Part(
        "lm-pruned",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        tuple(
            Setting(what.strip("-"), cut=what)
            for what in ("--mlp 0.125", "--mlp 0.25", "--mlp 0.5", "--heads 0.5", "--layers 1", "--layers 2")
        ),
        tuple(f"llmcomp {method}" for method in CUTTING),
        "llmcomp cut",
    ),
    "sst2-sparse": Part(
        "sst2-sparse",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        (Setting("2:4", pattern="2:4"), Setting("50%", pattern="0.5"), Setting("70%", pattern="0.7")),
        tuple(name for name, tool in TOOLS.items() if tool.method in PRUNING),
    ),
    "sst2-lowrank": Part(
        "sst2-lowrank",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        tuple(Setting(f"ratio {ratio}", ratio=ratio) for ratio in (0.8, 0.6, 0.4)),
        tuple(f"llmcomp {method}" for method in FACTORS),
        "llmcomp svd-llm-update",
    ),
    "sst2-pruned": Part(
        "sst2-pruned",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        tuple(Setting(what.strip("-"), cut=what) for what in ("--mlp 0.25", "--mlp 0.5", "--layers 1")),
        tuple(f"llmcomp {method}" for method in CUTTING),
        "llmcomp cut",
    ),
    "sst2": Part(
        "sst2",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        (Setting("4-bit g128", 4, 128), Setting("8-bit channel", 8, None)),
        # gptqmodel has no definition of BERT: it refuses the model.
        ("llmcomp", "llmcompressor gptq", "llmcompressor gptq-mse"),
    ),
}
