"""Time an ONNX export in onnxruntime, as `llmcomp bench` times a checkpoint: `python -m evals.peers.onnx_bench JOB`.

Reads model.onnx beside config.json, with the names of optimum's exports: an encoder's input_ids and attention_mask, a
decoder's past in and present out. The cache stays in onnxruntime's own values between tokens, so none of it is copied.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llmcomp.errors import UserError
from llmcomp.measure.bench_process import Job, serve

FILE = "model.onnx"
PAST, PRESENT = "past_key_values.", "present."
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Onnx:
    """An exported encoder or decoder, after its first token."""

    def __init__(self, job: Job) -> None:
        start = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
        file = Path(job.directory) / FILE
        try:
            self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base but this
            raise UserError(f"onnxruntime cannot load {file}: {' '.join(str(error).split())[:300]}") from error
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.vocabulary = json.loads((file.parent / "config.json").read_text())["vocab_size"]
        self.past: dict[str, Any] = {}
        self.load_seconds = time.perf_counter() - start
        self.read(self.prompt(1, 1))
        self.ready_seconds = time.perf_counter() - start

    def prompt(self, batch: int, tokens: int) -> np.ndarray:
        return np.random.default_rng(0).integers(self.vocabulary, size=(batch, tokens))

    def read(self, prompt: np.ndarray) -> None:
        self.past = {name: self._empty(name, len(prompt)) for name in self.inputs if name.startswith(PAST)}
        self._run(prompt, 0)

    def step(self) -> None:
        self._run(self.newest, self.length)

    def holding(self) -> None:
        return None

    def _empty(self, name: str, batch: int) -> Any:
        one = self.inputs[name]
        _, heads, _, width = one.shape
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, width), DTYPES[one.type]))

    def _run(self, ids: np.ndarray, before: int) -> None:
        rows, tokens = ids.shape
        self.length = before + tokens
        positions = np.broadcast_to(np.arange(before, self.length), ids.shape)
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self.length), np.int64),
            "position_ids": np.ascontiguousarray(positions),
            "token_type_ids": np.zeros_like(ids),
        }
        feed = {name: ort.OrtValue.ortvalue_from_numpy(values[name]) for name in values if name in self.inputs}
        found = self.session.run_with_ort_values(self.outputs, {**feed, **self.past})
        named = dict(zip(self.outputs, found, strict=True))
        if self.past:
            self.past = {PAST + name.removeprefix(PRESENT): named[name] for name in named if name.startswith(PRESENT)}
            self.newest = named["logits"].numpy()[:, -1:].argmax(-1)


def main() -> int:
    """Print the sample, or on stderr why there is none."""
    said, status = serve(sys.argv[1], Onnx, lambda job: None)
    print(said, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
