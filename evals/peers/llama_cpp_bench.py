"""Time a GGUF file in llama.cpp, as `llmcomp bench` times a checkpoint: `python -m evals.peers.llama_cpp_bench JOB`.

In an environment of its own with torch (which measures the memory's bandwidth), psutil and llama-cpp-python (0.3.36).
Below Python's conveniences: the C functions are called as llama-bench calls them, one sequence, logits of the last
token. llama.cpp lays weights out anew for some CPUs' instructions; with AMX its quantized kernels crash (0.3.36), so
there that is switched off.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from llmcomp.errors import UserError
from llmcomp.measure.bench_process import Job, serve
from llmcomp.measure.holding import Holding

FILE = "model.gguf"


class LlamaCpp:
    """A GGUF file with a cache of fixed size, after its first token."""

    def __init__(self, job: Job) -> None:
        if any(batch != 1 for batch, _ in job.shapes):
            raise UserError("llama.cpp is measured with one sequence at a time; give batch size 1.")
        start = time.perf_counter()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = not torch.cpu._is_amx_tile_supported()
        file = Path(job.directory) / FILE
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {file}.")
        context = llama_cpp.llama_context_default_params()
        longest = max(tokens for _, tokens in job.shapes)
        context.n_ctx = longest + job.new_tokens + 1
        context.n_batch = context.n_ubatch = longest
        context.n_threads = context.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.load_seconds = time.perf_counter() - start
        self.newest = 1
        self.read([1])
        self.ready_seconds = time.perf_counter() - start

    def prompt(self, batch: int, tokens: int) -> list[int]:
        drawn = torch.randint(self.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
        return [int(token) for token in drawn]

    def read(self, prompt: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._decode(prompt)

    def step(self) -> None:
        self._decode([self.newest])

    def holding(self) -> Holding:
        """What a token reads is not told: which table is only looked up in, is in the file's names."""
        return Holding(llama_cpp.llama_model_size(self.model), None, None)

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise UserError(f"llama.cpp could not compute {len(tokens)} tokens.")
        row = llama_cpp.llama_get_logits_ith(self.context, -1)
        self.newest = int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax())


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp tells of each tensor otherwise."""


def main() -> int:
    """Print the sample, or on stderr why there is none."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    said, status = serve(sys.argv[1], LlamaCpp, lambda job: llama_cpp.llama_backend_init())
    print(said, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
