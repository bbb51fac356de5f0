"""Endurance: compress-and-push killed at random moments, and many runs in one process.

    python -m evals.soak --kills 100         # SIGKILL at random moments of the run and its push, then the same command
    python -m evals.soak --runs 50           # anonymous memory and open files after each run in one process

Killed: a tiny model is quantized and pushed to a Hub on loopback (tests/hub_server.py). After each kill the output
must be missing or whole, to the byte that of an unbroken run, and main on the Hub must have nothing of the model or
all of it. Then the same command goes on (`llmcomp push` where the output stands), and may be killed again; in the end
all must be there. Every other round is pushed in parts of two files, by a pull request. One JSON line a round, the
sum at the end; exit status 1 where anything was wrong.

Commands are forked off a process that has imported torch, transformers and llmcomp, which would take most of the
time. What is killed is the run itself, and the verification that it starts is a fresh process, as ever.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402 (beside the tests)
from hub_writing import User  # noqa: E402
from tiny import tiny  # noqa: E402

from llmcomp.digests import digests  # noqa: E402

TOKEN = "hf_soaksoaksoaksoaksoaksoaksoak"
QUICK = ("--samples", "8", "--sequence-length", "32", "--no-evaluate")
# Kills of one run before its output stands, and after that, when only the push is left, which takes less time.
MOST_KILLS = {False: 2, True: 6}
# For each line of JSON it forks, and prints the child's process id, then its exit status.
LAUNCHER = """
import json, os, sys
import torch, transformers, compressed_tensors
import llmcomp.api, llmcomp.publishing, llmcomp.session, llmcomp.staging
from llmcomp.cli.main import main

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
        llmcomp.staging.MOST_FILES = asked["files"]
        os._exit(main(asked["command"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Soak:
    """Runs on one source, against one Hub, with a random moment for each kill."""

    def __init__(self, work: Path, hub: HubServer, seed: int) -> None:
        self.work, self.hub, self.random = work, hub, random.Random(seed)
        self.source = tiny("llama", work / "source", tokenizer=True)
        text = work / "text.txt"
        text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(4000)), encoding="utf-8")
        self.compress = ("quantize", str(self.source), "--calibration", str(text), *QUICK)
        self.environment = {
            **hub.environment(work / "home", HF_TOKEN=TOKEN), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], env=self.environment, cwd=work, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.call(("-o", str(work / "warm"), "--push-to-hub", "me/warm"), None)
        self.seconds = {
            False: self.timed(("-o", str(work / "reference"), "--push-to-hub", "me/reference")),
            True: self.timed((), ("push", str(work / "reference"), "me/second")),
        }
        self.expected = digests(work / "reference")
        there = digests(hub.root / "me/reference")  # the recipe without directories of this machine
        self.expected_there = {name: there[name] for name in self.expected}

    def timed(self, more: tuple[str, ...], push: tuple[str, ...] = ()) -> float:
        began = time.monotonic()
        self.call(more, None, push)
        return time.monotonic() - began

    def call(self, more: tuple[str, ...], after: float | None, push: tuple[str, ...] = (), files: int = 50) -> int:
        """The exit status of a command, of one that was killed `after` so many seconds -9; `files`: of one commit."""
        asked = {"command": push or (*self.compress, *more), "log": str(self.work / "log"), "files": files}
        assert self.launcher.stdin is not None and self.launcher.stdout is not None
        self.launcher.stdin.write(json.dumps(asked) + "\n")
        child = int(self.launcher.stdout.readline())
        killer = threading.Timer(after or 0, kill, (child,))
        if after is not None:
            killer.start()
        status = int(self.launcher.stdout.readline())
        if after is not None:
            killer.cancel()
            killer.join()
        if status not in (0, -9):
            raise RuntimeError((self.work / "log").read_text())
        return status

    def round(self, number: int) -> dict[str, Any]:
        """One run with some kills; what was found."""
        output, repo = self.work / f"out{number}", f"me/out{number}"
        kills: list[float] = []
        struck: list[str] = []
        count = {False: 0, True: 0}
        wrong: list[str] = []
        while True:
            stands = output.exists()
            alive = count[stands] == MOST_KILLS[stands]
            after = None if alive else self.random.uniform(0, 1.1 * self.seconds[stands])
            push = ("push", str(output), repo) if stands else ()
            files = 2 if number % 2 else 50
            status = self.call(("-o", str(output), "--push-to-hub", repo), after, push, files)
            wrong += self.check(output, repo)
            if status == 0:
                break
            kills.append(round(after or 0, 2))
            count[stands] += 1
            struck.append(self.where(output, repo))
        missing = [] if output.exists() and self.pushed(repo) else ["lost: it ended, and not all is there"]
        return {"round": number, "kills": kills, "while": struck, "wrong": wrong + missing}

    def where(self, output: Path, repo: str) -> str:
        """How far the run was when it was killed."""
        if not output.exists():
            return "compressing" if output.with_name(f".{output.name}.partial").exists() else "starting"
        if not (self.hub.root / repo).exists():
            return "before the push"
        return "pushed" if self.pushed(repo) else "pushing"

    def check(self, output: Path, repo: str) -> list[str]:
        found = []
        if output.exists() and digests(output) != self.expected:
            found.append("the output is there and is not that of an unbroken run")
        folder = self.hub.root / repo
        if folder.exists() and digests(folder) and not self.pushed(repo):
            found.append("half a model is visible on the Hub")
        return found

    def pushed(self, repo: str) -> bool:
        there = digests(self.hub.root / repo) if (self.hub.root / repo).exists() else {}
        return all(there.get(name) == digest for name, digest in self.expected_there.items())


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(child, signal.SIGKILL)


def killed(kills: int, seed: int) -> bool:
    """Rounds until so many kills have struck; whether all went well."""
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder) / "hub") as hub:
        hub.users[TOKEN] = User("me")
        soak = Soak(Path(folder), hub, seed)
        done, wrong, rounds = 0, 0, 0
        struck: Counter[str] = Counter()
        while done < kills:
            found = soak.round(rounds)
            rounds, done, wrong = rounds + 1, done + len(found["kills"]), wrong + len(found["wrong"])
            struck.update(found["while"])
            print(json.dumps(found), flush=True)
        soak.launcher.kill()
        soak.launcher.wait()
    print(json.dumps({"rounds": rounds, "kills": done, "while": dict(struck), "wrong": wrong,
                      "seconds of one run": round(soak.seconds[False], 1),
                      "of one push": round(soak.seconds[True], 1)}))  # fmt: skip
    return wrong == 0


def repeated(runs: int) -> bool:
    """Runs in this process: neither memory nor files may grow from the second fifth to the last."""
    import llmcomp
    from evals.common import read_memory

    memory, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = tiny("llama", Path(folder) / "source", tokenizer=True)
        for number in range(runs):
            llmcomp.quantize(str(source), calibration="sample", output=Path(folder) / "out", overwrite=True,
                             evaluate=False, verify=False)  # fmt: skip
            memory.append(read_memory(Path("/proc/self/status").read_text()).anonymous)
            files.append(len(list(Path("/proc/self/fd").iterdir())))
            print(json.dumps({"run": number, "anonymous": memory[-1], "files": files[-1]}), flush=True)
    part = max(1, runs // 5)
    early, late = max(memory[part : 2 * part]), max(memory[-part:])
    print(json.dumps({"runs": runs, "early": early, "late": late, "files": [min(files), files[-1]]}))
    return late <= 1.05 * early and files[-1] <= files[part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    fine = [killed(given.kills, given.seed)] if given.kills else []
    fine += [repeated(given.runs)] if given.runs else []
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
