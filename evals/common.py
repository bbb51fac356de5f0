"""What every benchmark shares: the windows, the loss, the statistics, the stage marks.

All tools are measured with this one file, each in its own environment, so it imports nothing beyond the
standard library, numpy, torch and transformers, and torch only inside the functions that need it. The
conventions are those of `<assets>/data/README.md`: perplexity over non-overlapping windows without a
beginning token, tail dropped, loss in fp32; calibration windows evenly spaced over one text, where seed s
shifts each window by s/3 of the spacing, so that three seeds never share a window's start.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SEEDS = (0, 1, 2)
EVAL_TOKENS = 65_536
EVAL_WINDOW = 256
MARKS_ENV = "LLMCOMP_EVAL_MARKS"


def assets_root() -> Path:
    """The folder with `models/` and `data/`, from LLMCOMP_ASSETS (default `../shared`)."""
    return Path(os.environ.get("LLMCOMP_ASSETS", Path(__file__).resolve().parents[2] / "shared"))


def cache_root() -> Path:
    """Where results per window are kept between runs, from LLMCOMP_EVAL_CACHE."""
    return Path(os.environ.get("LLMCOMP_EVAL_CACHE", Path.home() / ".cache" / "llmcomp-evals"))


# ---------------------------------------------------------------- windows


def window_starts(tokens: int, windows: int, length: int, seed: int, seeds: int = len(SEEDS)) -> list[int]:
    """First token of each calibration window.

    Args:
        tokens: length of the tokenized text.
        windows: how many windows, evenly spaced.
        length: tokens in one window.
        seed: shifts every window by `seed / seeds` of the spacing, 0 <= seed < seeds.

    Raises:
        ValueError: the text is shorter than the windows laid end to end, or the seed is out of range.
    """
    if not 0 <= seed < seeds:
        raise ValueError(f"seed {seed} is outside 0..{seeds - 1}")
    if tokens < windows * length:
        raise ValueError(f"{tokens} tokens cannot hold {windows} windows of {length}")
    # (i + seed / seeds) * (tokens - length) / windows in whole numbers: floats would differ by a token.
    return [(i * seeds + seed) * (tokens - length) // (seeds * windows) for i in range(windows)]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """`text` as token ids, no special tokens. The length warning of long texts is not asked for."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def calibration_windows(
    model: Path, text: Path, seed: int, windows: int = 64, length: int = 256
) -> torch.Tensor:
    """Calibration windows [windows, length] int64 of a text file, by `window_starts`."""
    import torch
    from transformers import AutoTokenizer

    ids = token_ids(AutoTokenizer.from_pretrained(model), text.read_text(encoding="utf-8"))
    starts = window_starts(len(ids), windows, length, seed)
    return torch.tensor([ids[s : s + length] for s in starts], dtype=torch.int64)


def calibration_rows(rows: Path, seed: int, count: int = 256) -> list[dict[str, Any]]:
    """Rows with `sentence` and `label`, evenly spaced over a JSONL file, by `window_starts` of single rows."""
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [found[i] for i in window_starts(len(found), count, 1, seed)]


def padded_tokens(model: Path, sentences: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both [sentences, longest] int64, special tokens included."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(model)(sentences, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def evaluation_windows(tokenizer: Any, text: Path) -> torch.Tensor:
    """The first 65,536 tokens of a text file as windows [256, 256] int64."""
    import torch

    ids = token_ids(tokenizer, text.read_text(encoding="utf-8"))[:EVAL_TOKENS]
    return torch.tensor(ids[: len(ids) // EVAL_WINDOW * EVAL_WINDOW], dtype=torch.int64).view(-1, EVAL_WINDOW)


# ---------------------------------------------------------------- measures


def window_losses(model: torch.nn.Module, windows: torch.Tensor, batch: int = 8) -> np.ndarray:
    """Mean negative log-likelihood of each window in nats, float64 [windows].

    Args:
        model: a causal LM whose forward returns `.logits` [batch, length, vocabulary].
        windows: [windows, length] int64.
    """
    import torch
    import torch.nn.functional as F

    losses = []
    with torch.inference_mode():
        for part in windows.split(batch):
            logits = model(input_ids=part, use_cache=False).logits.float()
            # The last position predicts a token outside the window; -100 makes cross_entropy skip it.
            targets = F.pad(part[:, 1:], (0, 1), value=-100)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses.append(loss.view_as(part)[:, :-1].double().mean(dim=1))
    return torch.cat(losses).numpy()


def sentence_kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats of each row of two logit arrays [rows, labels]; float64 [rows]."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(candidate)
    return (np.exp(p) * (p - q)).sum(axis=1)


def sentence_labels(path: Path) -> np.ndarray:
    """Labels int64 [rows] of a JSONL file with `sentence` and `label`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return np.array([int(json.loads(line)["label"]) for line in lines])


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, in the unit of what was averaged."""

    mean: float
    low: float
    high: float


def paired_interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """95% bootstrap interval of mean(ours - theirs) over windows and calibration seeds.

    Both factors are resampled with replacement (the crossed bootstrap of Owen, 2007,
    "The pigeonhole bootstrap"): every window is read by every calibrated model, so windows are shared
    between seeds and must be drawn once for all of them, or their noise would be counted as averaged out.

    Args:
        ours, theirs: [seeds, windows], same seeds and windows in the same order.

    Raises:
        ValueError: the two do not have one shape of two dimensions.
    """
    ours, theirs = _alike(ours, theirs)
    (means,) = _drawn_means(draws, seed, ours - theirs)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float((ours - theirs).mean()), float(low), float(high))


def paired_ratio(top: np.ndarray, bottom: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """mean(top) / mean(bottom) with its 95% interval, both drawn together as in `paired_interval`.

    Args:
        top, bottom: [seeds, windows], same seeds and windows in the same order.

    Returns:
        The ratio; NaN bounds where the denominator is 0 in some draw, of which no ratio can be had.

    Raises:
        ValueError: the two do not have one shape of two dimensions.
    """
    top, bottom = _alike(top, bottom)
    above, below = _drawn_means(draws, seed, top, bottom)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(np.where(below == 0, np.nan, above / below), [2.5, 97.5])
        return Interval(float(top.mean() / bottom.mean()), float(low), float(high))


def _alike(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(f"expected two arrays [seeds, windows] of one shape, got {one.shape} and {other.shape}")
    return np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)


def _drawn_means(draws: int, seed: int, *values: np.ndarray) -> list[np.ndarray]:
    """Of arrays [seeds, windows] the means of each draw, [draws]; all are drawn together."""
    rng = np.random.default_rng(seed)
    seeds, windows = values[0].shape
    # How often each seed and each window was drawn; the mean of a draw is then one bilinear form.
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    by_window = rng.multinomial(windows, np.full(windows, 1 / windows), size=draws) / windows
    return [np.einsum("ds,sw,dw->d", by_seed, one, by_window, optimize=True) for one in values]


def percent(interval: Interval) -> Interval:
    """A difference of mean losses in nats as a relative change of perplexity in percent."""
    return Interval(*(float(np.expm1(value) * 100) for value in (interval.mean, interval.low, interval.high)))


# ---------------------------------------------------------------- stage marks


@dataclass(frozen=True)
class Memory:
    """Resident memory of one process in bytes, as the kernel counts it in /proc/PID/status."""

    anonymous: int
    mapped: int  # file-backed and shared pages: mapped weights, libraries
    resident: int
    high_water: int  # the kernel's own maximum of `resident`, which no sampling can miss


def read_memory(status: str) -> Memory:
    """Parse the text of a /proc/PID/status file."""
    field = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmRSS", "VmHWM"):
            field[name] = int(value.split()[0]) * 1024
    return Memory(field["RssAnon"], field["RssFile"] + field["RssShmem"], field["VmRSS"], field["VmHWM"])


def mark(stage: str) -> None:
    """Append a stage's name, time and this process's memory to the file that the runner named.

    Outside the runner (no file named) it does nothing, so that the scripts can be run by hand. Stages:
    IMPORTED when the tool's modules are in memory and nothing of the model is, DONE when the checkpoint
    is on disk; others between them are for reading where the time went.
    """
    target = os.environ.get(MARKS_ENV)
    if target is None:
        return
    memory = read_memory(Path("/proc/self/status").read_text())
    row = {"stage": stage, "time": time.time(), "processor": time.process_time(), **asdict(memory)}
    with Path(target).open("a") as file:
        file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- tables


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, columns padded so that it also reads as plain text."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
