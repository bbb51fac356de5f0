"""Run one command of llmcomp as two hosts would: two network namespaces with an address each, joined by a cable.

    python scripts/two_hosts.py recover sample-lm-alps-2of4 --data default --method full --teacher sample:lm

Each host starts its process by `accelerate launch`, as real ones do (examples/accelerate/two-hosts.yaml); they share
files, the clock and nothing of the network. It needs Linux, `ip` of iproute2, and leave to make namespaces, which root
has and most systems give to users; where there is none, the exit status is 3 and a sentence says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

REFUSED = 3  # exit status where namespaces cannot be made
_INSIDE = "LLMCOMP_TWO_HOSTS"
_HOSTS = ("10.77.0.1", "10.77.0.2")
_PORT, _DEVICE, _LIMIT = "29500", "cable", 1800.0


def main(words: Sequence[str]) -> int:
    """Make the hosts in namespaces that end with this process, and run the command on both."""
    if os.environ.get(_INSIDE):
        return _run(words)
    if problem := _problem():
        sys.stderr.write(f"two_hosts: {problem}\n")
        return REFUSED
    environment = {**os.environ, _INSIDE: "1"}
    return subprocess.run([*_unshare(), sys.executable, __file__, *words], env=environment, check=False).returncode


def _unshare() -> list[str]:
    """A network and mounts of our own; who is not root becomes it inside."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_root, "--mount", "--net"]


def _problem() -> str | None:
    """Why namespaces cannot be made here."""
    if lacking := [name for name in ("unshare", "ip") if shutil.which(name) is None]:
        return f"{lacking[0]} is not installed, which makes network namespaces."
    tried = subprocess.run([*_unshare(), "sh", "-c", _MAKE], capture_output=True, text=True, check=False)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"network namespaces are not permitted here ({said})."
    return None


_MAKE = f"""
set -e
mkdir -p /run/netns && mount -t tmpfs none /run/netns
ip netns add host0
ip netns add host1
ip link add end0 type veth peer name end1
for n in 0 1; do
    ip link set end$n netns host$n
    ip -n host$n link set lo up
    ip -n host$n link set end$n name {_DEVICE}
    ip -n host$n addr add 10.77.0.$((n + 1))/24 dev {_DEVICE}
    ip -n host$n link set {_DEVICE} up
done
"""


def _run(words: Sequence[str]) -> int:
    """On both hosts; the first exit status that is not zero."""
    subprocess.run(["sh", "-c", _MAKE], check=True)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": _DEVICE, "NCCL_SOCKET_IFNAME": _DEVICE}
    environment.pop(_INSIDE)
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes",
        "2", "--main_process_ip", _HOSTS[0], "--main_process_port", _PORT, "--mixed_precision", "no",
        "--dynamo_backend", "no",
    ]  # fmt: skip
    hosts = [
        subprocess.Popen(["ip", "netns", "exec", f"host{rank}", *launch, "--machine_rank", str(rank), "-m", "llmcomp",
                          *words], env=environment)
        for rank in range(len(_HOSTS))
    ]  # fmt: skip
    try:
        statuses = [host.wait(_LIMIT) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
