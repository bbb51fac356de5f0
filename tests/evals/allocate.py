"""A tool whose memory is known: run by test_process.py through the benchmark's own runner.

    python -m tests.evals.allocate own|child|fail

`own` holds 150 MB of anonymous memory for half a second and maps a file of 64 MB; `child` lets a child
process hold the 150 MB instead; `fail` says why and ends with status 3.
"""

import mmap
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evals.common import mark

MB = 1_000_000
HOLD = f"block = bytearray(b'x') * (150 * {MB}); import time; time.sleep(0.5)"


def main(what: str) -> int:
    mark("IMPORTED")
    if what == "fail":
        print("the disk is on fire")
        return 3
    if what == "child":
        subprocess.run([sys.executable, "-c", HOLD], check=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mapped"
            path.write_bytes(bytes(64 * MB))
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                sum(pages[:: mmap.PAGESIZE])
                block = bytearray(b"x") * (150 * MB)
                time.sleep(0.5)
                del block
    mark("DONE")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
