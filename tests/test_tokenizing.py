"""A tokenizer's memory of words, which outlives it: switched off, and nothing else changed by that."""

from __future__ import annotations

import ctypes
import gc
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny

from llmcomp.measure.load import load_tokenizer
from llmcomp.tokenizing import forgetful

WORDS = ["".join(random.Random(seed).choices("abcdefghij", k=9)) for seed in range(12_000)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source") / "model", tokenizer=True)


class _Usage(ctypes.Structure):
    """mallinfo2 of glibc; uordblks is what is allocated and not freed, in bytes."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def allocated() -> int:
    gc.collect()
    try:
        usage = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("no mallinfo2 in this C library")
    usage.restype = _Usage
    found = usage()
    return int(found.uordblks + found.hblkhd)


def test_tokenizers_that_are_gone_leave_nothing(source: Path) -> None:
    def read() -> None:
        load_tokenizer(source)(" ".join(WORDS), add_special_tokens=False, verbose=False)

    read()
    before = allocated()
    for _ in range(5):
        read()
    assert allocated() - before < 4_000_000  # 24,000,000 with the memory


def test_ids_stay_what_they_were(source: Path) -> None:
    import transformers

    plain = transformers.AutoTokenizer.from_pretrained(source)
    text = " ".join(WORDS[:50]) * 2
    assert load_tokenizer(source)(text)["input_ids"] == plain(text)["input_ids"]


def test_what_has_no_such_memory_passes_through() -> None:
    for given in (object(), SimpleNamespace(tokenizer=object()), None):
        assert forgetful(given) is given
