"""llmcomp's GGUF files in llama.cpp, beside the same weights in transformers.

    python -m evals.gguf_check --python PYTHON [--model models/lm] [--windows 4] [--settings "4-bit g128" …]

PYTHON is one with llama-cpp-python (`pip install llama-cpp-python numpy`); on CPUs with AMX, whose kernels ended with a
segmentation fault here, built with CMAKE_ARGS="-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF".

For each setting the model is rounded to nearest, exported, and read by llama.cpp; transformers computes with the same
integers, decoded in float32. "error" is the norm of the difference of logits over that of the logits, each position's
mean taken out; KL and top-1 are of the same two; perplexities each its own. "as F16" is the error of a file with these
decoded weights in F16: what is left when inputs are not rounded to 8 bits. Tokens of texts must be the tokenizer's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evals.common import assets_root, markdown, token_ids
from evals.process import machine, versions

RUNNER = Path(__file__).with_name("llama_cpp_logits.py")
LENGTH = 256
HARD = "Über 3.14159 \t tabs,  spaces\n\n\nЖ 日本語 🚀🚀 don't I'LL  \u00a0 end "
EVERYWHERE = ("attention", "mlp", "embeddings", "head")


@dataclass(frozen=True)
class Setting:
    """What is quantized how; without bits nothing is."""

    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool = True
    targets: tuple[str, ...] = ("attention", "mlp")


SETTINGS = {
    "dense": Setting(),
    "8-bit channel, all": Setting(8, "channel", targets=EVERYWHERE),
    "8-bit g32": Setting(8, 32),
    "4-bit g128": Setting(4, 128),
    "4-bit g32 asym": Setting(4, 32, False),
    "4-bit channel, all": Setting(4, "channel", targets=EVERYWHERE),
    "3-bit g64 asym": Setting(3, 64, False),
    "2-bit g32": Setting(2, 32),
}


@dataclass(frozen=True)
class Answer:
    """What llama.cpp made of a file: logits [tokens, vocabulary] of each sequence, ids of each text."""

    logits: list[np.ndarray]
    tokens: list[list[int]]


def ask(python: Path, model: Path, ids: list[list[int]], texts: list[str]) -> Answer:
    """Let llama.cpp read a file in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        request.write_text(json.dumps({"model": str(model), "ids": ids, "texts": texts}), encoding="utf-8")
        done = subprocess.run([str(python), str(RUNNER), str(request), str(answer)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llama.cpp on {model}: status {done.returncode}: {done.stderr[-2000:]}")
        with np.load(answer) as found:
            logits = [found[f"logits{number}"] for number in range(len(ids))]
            tokens = [found[f"tokens{number}"].tolist() for number in range(len(texts))]
    return Answer(logits, tokens)


def decoded_model(directory: Path) -> Any:
    """The checkpoint's model in transformers, in float32, its packed weights decoded in float64 and rounded once."""
    import torch

    from llmcomp.formats.opening import open_checkpoint
    from llmcomp.formats.reading import auto_class

    opened = open_checkpoint(directory)
    config: Any = type(opened.skeleton.config).from_dict(dict(opened.config))
    model = auto_class(config).from_config(config).to(torch.float32).eval()
    state = {name: opened.tensor(name).float() for name in opened.plain}
    for module in opened.schemes:
        weight = opened.weight(module)
        state[f"{module}.weight"] = replace(weight, scale=weight.scale.double()).dense().float()
    missing, extra = model.load_state_dict(state, strict=False)
    if extra or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(f"{directory}: {missing} missing, {extra} too many")
    model.tie_weights()
    return model


def logits_of(model: Any, ids: list[list[int]]) -> list[np.ndarray]:
    """transformers' logits [tokens, vocabulary] float32 of each sequence."""
    import torch

    with torch.inference_mode():
        return [model(torch.tensor([one]), use_cache=False).logits[0].float().numpy() for one in ids]


def export(directory: Path, output: Path) -> list[str]:
    """Write `output`/model.gguf; what the user is told."""
    from llmcomp.exports import EXPORTS
    from llmcomp.formats.opening import open_checkpoint

    output.mkdir(parents=True)
    return EXPORTS["gguf"](open_checkpoint(directory), output)


# --- measures ---


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Norm of the difference over that of `wanted`, each position's mean taken out of both."""
    a, b = (np.concatenate(part).astype(np.float64) for part in (found, wanted))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Mean KL divergence of `found` from `wanted`, in nats."""
    a, b = (log_softmax(np.concatenate(part)) for part in (found, wanted))
    return float((np.exp(b) * (b - a)).sum(-1).mean())


def agreement(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Share of positions with the same most likely token."""
    a, b = (np.concatenate(part).argmax(-1) for part in (found, wanted))
    return float((a == b).mean())


def perplexity(logits: list[np.ndarray], ids: list[list[int]]) -> float:
    losses = []
    for one, tokens in zip(logits, ids, strict=True):
        losses.append(-log_softmax(one[:-1])[np.arange(len(tokens) - 1), tokens[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


# --- one row ---


def quantized(model: Path, setting: Setting, output: Path) -> Path:
    """The checkpoint of a setting; the model itself for none."""
    if setting.bits is None:
        return model
    import llmcomp
    from llmcomp.recipe import QuantizeStep, Recipe

    step = QuantizeStep("rtn", setting.bits, setting.group_size, setting.symmetric, targets=setting.targets)
    return llmcomp.quantize(str(model), recipe=Recipe((step,)), output=output, evaluate=False, verify=False).output


def row(name: str, model: Path, python: Path, ids: list[list[int]], texts: list[str]) -> list[str]:
    """One line of the table."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint = quantized(model, SETTINGS[name], place / "checkpoint")
        notes = export(checkpoint, place / "gguf")
        decoded = decoded_model(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(model)
        decoded.save_pretrained(place / "dense")
        tokenizer.save_pretrained(place / "dense")
        export(place / "dense", place / "dense-gguf")
        wanted = logits_of(decoded, ids)
        answer = ask(python, place / "gguf" / "model.gguf", ids, texts)
        control = ask(python, place / "dense-gguf" / "model.gguf", ids, [])
        size = (place / "gguf" / "model.gguf").stat().st_size / 1e6
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr, flush=True)
    same = sum(tokens == tokenizer(text)["input_ids"] for tokens, text in zip(answer.tokens, texts, strict=True))
    kinds = notes[0].removeprefix("Matrices in model.gguf: ").removesuffix(".")
    return [
        name, kinds, f"{size:.1f}", f"{error(answer.logits, wanted):.2e}", f"{error(control.logits, wanted):.2e}",
        f"{divergence(answer.logits, wanted):.2e}", f"{agreement(answer.logits, wanted):.2%}",
        f"{perplexity(wanted, ids):.3f}", f"{perplexity(answer.logits, ids):.3f}", f"{same} of {len(texts)}",
    ]  # fmt: skip


HEADER = [
    "checkpoint", "matrices", "MB", "error", "as F16", "KL", "top-1", "perplexity, transformers",
    "perplexity, llama.cpp", "texts with equal tokens",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="one with llama-cpp-python")
    parser.add_argument("--model", default="models/lm", help="below LLMCOMP_ASSETS")
    parser.add_argument("--text", default="data/books/validation.txt", help="below LLMCOMP_ASSETS")
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    print(json.dumps(machine(1)))
    print(json.dumps(versions(Path(sys.executable), ["llmcomp", "gguf", "torch", "transformers"])))
    print(json.dumps(versions(args.python, ["llama_cpp_python", "numpy"])))
    model, text = assets_root() / args.model, (assets_root() / args.text).read_text(encoding="utf-8")
    ids = token_ids(AutoTokenizer.from_pretrained(model), text[: 20 * LENGTH * args.windows])
    windows = [ids[start * LENGTH : (start + 1) * LENGTH] for start in range(args.windows)]
    texts = [*(text[start : start + 5000] for start in range(0, 50_000, 5000)), HARD]
    rows = []
    for name in args.settings:
        rows.append(row(name, model, args.python, windows, texts))
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"\n{args.model}, {args.windows} windows of {LENGTH} tokens of {args.text}\n\n{markdown(HEADER, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
