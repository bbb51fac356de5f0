"""Make one virtual environment for each peer, so that their pins do not meet each other or llmcomp's.

    python -m evals.setup_peers [llmcompressor auto_round gptqmodel]

The environments lie in the folder that LLMCOMP_PEERS names (default `~/.cache/llmcomp-peers`). torch goes
in first at the version that llmcomp is measured with, and the peer then follows under a constraint of that
one line: without it gptqmodel's newest release pulls a newer torch, and the comparison would be one of
torch versions. On a machine with a GPU the constraint also keeps the CPU build where pip finds one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
# peer -> requirements. optimum is what transformers asks for before it opens a GPTQ checkpoint.
PEERS = {
    "llmcompressor": ["llmcompressor==0.14.0.1"],
    "auto_round": ["auto-round==0.16.1"],
    "gptqmodel": ["gptqmodel==7.6.0", "optimum==2.3.0"],
}


def peers_root() -> Path:
    """The folder that holds one environment per peer."""
    return Path(os.environ.get("LLMCOMP_PEERS", Path.home() / ".cache" / "llmcomp-peers"))


def peer_python(peer: str) -> Path:
    """The interpreter of `peer`'s environment (which need not exist yet)."""
    return peers_root() / peer / "bin" / "python"


def make(peer: str) -> None:
    """Create `peer`'s environment and install its pins; an existing one is brought to the pins.

    Raises:
        subprocess.CalledProcessError: pip could not install them; its own message says why.
    """
    folder = peers_root() / peer
    if not peer_python(peer).exists():
        venv.create(folder, with_pip=True)
    pip = [str(peer_python(peer)), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(TORCH + "\n")
        constraint.flush()
        # The torch pin is named again: a constraint alone lets pip's resolver drop an installed torch.
        subprocess.run([*pip, "-c", constraint.name, TORCH, *PEERS[peer]], check=True)


def main(argv: list[str] | None = None) -> int:
    """Make the environments named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"any of: {', '.join(PEERS)} (default: all)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.peers) - set(PEERS))
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; expected any of {', '.join(PEERS)}")
    for peer in args.peers or PEERS:
        make(peer)
        print(f"{peer}: {peer_python(peer)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
