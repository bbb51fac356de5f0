"""Run one tool in its own interpreter and measure its time and memory from outside.

Memory is the *anonymous* resident memory (RssAnon) of the process and all its descendants, sampled from
/proc every 20 ms between the tool's IMPORTED and DONE marks, minus what the tool itself read at IMPORTED.
Mapped pages (a safetensors file read in place) are the page cache's, given back under pressure, and are
reported apart. Sampling can miss a spike, so the kernel's own high-water mark of the process (VmHWM, which
no sampling misses) is compared with the largest resident size that was sampled: `missed` is the difference.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from evals.common import MARKS_ENV, Memory, read_memory

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.02  # seconds between two samples


@dataclass(frozen=True)
class Measured:
    """One finished run. Seconds and bytes; `stages` are seconds since IMPORTED."""

    seconds: float  # checkpoint in to checkpoint out, without imports
    process_seconds: float  # the whole process, imports included
    peak_anonymous: int  # above its value after imports, descendants included
    peak_mapped: int  # largest file-backed and shared resident size
    baseline_anonymous: int
    missed: int  # VmHWM minus the largest sampled resident size of the main process, 0 at best
    stages: dict[str, float] = field(default_factory=dict)
    processor_seconds: float = 0.0  # of the process itself and its threads, between the same marks


class RunFailed(RuntimeError):  # an event of the benchmark, not an error in it
    """A tool ended with an error; the message ends with the last lines that it wrote."""


@dataclass(frozen=True)
class Sample:
    """Memory at one time (seconds since the epoch): of the process itself and with all descendants."""

    time: float
    own: Memory
    tree_anonymous: int
    tree_mapped: int


def descendants(pid: int) -> list[int]:
    """Every living descendant of `pid`, children first; empty when it has none or is gone."""
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
    for thread in threads:
        try:
            found += [int(child) for child in (thread / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread ended between the listing and the reading
    return found + [deeper for child in found for deeper in descendants(child)]


def memory_of(pid: int) -> Memory | None:
    """The memory of a living process, None when it is gone or a zombie (which has none)."""
    try:
        return read_memory(Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


class Monitor(threading.Thread):
    """Samples the memory of a process tree until the process is gone or `stop` is called."""

    def __init__(self, pid: int, interval: float = INTERVAL) -> None:
        super().__init__(daemon=True)
        self.pid, self.interval = pid, interval
        self.samples: list[Sample] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        """Thread body: one sample every `interval` seconds."""
        while not self._stopped.wait(self.interval):
            own = memory_of(self.pid)
            if own is None:
                return
            below = [m for m in map(memory_of, descendants(self.pid)) if m is not None]
            self.samples.append(
                Sample(
                    time.time(),
                    own,
                    own.anonymous + sum(m.anonymous for m in below),
                    own.mapped + sum(m.mapped for m in below),
                )
            )

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self.join()


def environment(threads: int) -> dict[str, str]:
    """This process's environment with the thread count of every pool set and the Hub switched off."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    # gptqmodel's own pool of workers; it does not start with fewer than two.
    fixed["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))
    return {**os.environ, **{pool: str(threads) for pool in pools}, **fixed}


def run(python: Path, module: str, arguments: list[str], threads: int) -> Measured:
    """Run `python -m module arguments` in an empty folder and measure it; paths must be absolute.

    The module must call `evals.common.mark("IMPORTED")` and `mark("DONE")`.

    Raises:
        RunFailed: the process ended with an error or without its marks.
    """
    with tempfile.TemporaryDirectory() as folder:
        marks, log = Path(folder) / "marks.jsonl", Path(folder) / "log.txt"
        started = time.time()
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                cwd=folder,  # some tools write logs where they stand
                env={**environment(threads), MARKS_ENV: str(marks)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            monitor = Monitor(process.pid)
            monitor.start()
            status = process.wait()
        ended = time.time()
        monitor.stop()
        rows = [json.loads(line) for line in marks.read_text().splitlines()] if marks.exists() else []
        if status != 0 or not rows or rows[-1]["stage"] != "DONE":
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RunFailed(f"{module} ended with status {status}; it wrote:\n{tail}")
    return summarize(rows, monitor.samples, ended - started)


def summarize(rows: list[dict], samples: list[Sample], process_seconds: float) -> Measured:
    """Join the marks of a run (first IMPORTED, last DONE) with the samples between them."""
    first, last = rows[0], rows[-1]
    inside = [s for s in samples if first["time"] <= s.time <= last["time"]]
    # The marks are exact readings by the process itself, so they count as samples too.
    anonymous = max([s.tree_anonymous for s in inside] + [row["anonymous"] for row in rows])
    mapped = max([s.tree_mapped for s in inside] + [row["mapped"] for row in rows])
    resident = max(
        [s.own.resident for s in samples if s.time <= last["time"]] + [r["resident"] for r in rows]
    )
    return Measured(
        seconds=last["time"] - first["time"],
        process_seconds=process_seconds,
        peak_anonymous=anonymous - first["anonymous"],
        peak_mapped=mapped,
        baseline_anonymous=first["anonymous"],
        missed=max(0, last["high_water"] - resident),
        stages={row["stage"]: row["time"] - first["time"] for row in rows[1:]},
        processor_seconds=last.get("processor", 0.0) - first.get("processor", 0.0),
    )


def machine(threads: int) -> dict[str, object]:
    """What the figures were measured on: processor, the instructions that matter here, threads, date."""
    info = Path("/proc/cpuinfo").read_text()
    lines = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(values.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "amx_tile")
    return {
        "cpu": f"{values.get('model name', platform.processor())} (family {values.get('cpu family', '?')}, "
        f"model {values.get('model', '?')})",
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def versions(python: Path, packages: list[str]) -> dict[str, str]:
    """Installed versions of `packages` as the interpreter `python` sees them; absent ones are left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError:\n        continue\n"
        "print(json.dumps(found))"
    )
    answer = subprocess.run([str(python), "-c", code, *packages], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def as_row(measured: Measured) -> dict:
    """`measured` as plain JSON types."""
    return asdict(measured)
