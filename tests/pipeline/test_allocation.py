"""How the C library is told to treat large blocks: apart while activations wait, reused while a block learns."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are limits of glibc's allocator")

TIMES = 50
# In a process of its own: the heap of one that has run other tests has room that nobody counts.
SCRIPT = f"""
import json, resource, torch
from llmcomp.pipeline.memory import anonymous_memory, keep_large_blocks_apart, reusing_large_blocks

def faults():
    torch.ones(2**18)  # 1 MB of float32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({TIMES}):
        torch.ones(2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_large_blocks_apart()
found = {{"before": faults()}}
base = anonymous_memory()
with reusing_large_blocks():
    found["within"] = faults()
    many = [torch.ones(2**18) for _ in range(64)]
    del many
    found["held"] = anonymous_memory() - base
found["left"] = anonymous_memory() - base
found["after"] = faults()
try:
    with reusing_large_blocks():
        1 / 0
except ZeroDivisionError:
    found["after an error"] = faults()
print(json.dumps(found))
"""


def test_freed_blocks_are_reused_while_it_lasts_and_given_back_afterwards() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert min(found["before"], found["after"], found["after an error"]) >= TIMES  # each block faults in its own pages
    assert found["within"] < found["before"] / 4  # the heap grows at first
    assert found["held"] > 32 * 2**20  # half of what was freed, at least
    assert found["left"] < found["held"] / 4
