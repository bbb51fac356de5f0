"""A fresh process that loads checkpoints as any user of transformers would, then asks llmcomp's own check.

stdin: {name: {"output", "source", "witness"}}; the last line of stdout: {name: findings}. Until every
checkpoint is loaded and run, no module of llmcomp is imported.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def load(directory: str) -> tuple[Any, dict[str, Any]]:
    """The model by its own class's from_pretrained, and transformers' account of the loading."""
    config = transformers.AutoConfig.from_pretrained(directory)
    family = getattr(transformers, config.architectures[0])
    model, account = family.from_pretrained(directory, output_loading_info=True)
    return model.eval(), account


def spread(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over the standard deviation of `wanted`."""
    return float((output - wanted).square().mean().sqrt() / wanted.std())


def findings(case: dict[str, str]) -> dict[str, Any]:
    kept = load_file(f"{case['witness']}/witness.safetensors")
    model, account = load(case["output"])
    original, _ = load(case["source"])
    with torch.no_grad():
        inputs = {name.removeprefix("input."): value for name, value in kept.items() if name.startswith("input.")}
        output, before = model(**inputs)[0], original(**inputs)[0]
    return {
        "account": {key: sorted(map(str, value)) for key, value in account.items() if value},
        "class": type(model).__name__,
        "from_witness": spread(output, kept["output"]),
        "from_original": spread(output, before),
    }


def main() -> None:
    torch.set_num_threads(1)
    cases = json.load(sys.stdin)
    found = {name: findings(case) for name, case in cases.items()}
    imported = [module for module in sys.modules if module.split(".")[0] == "llmcomp"]
    from llmcomp.errors import VerificationFailed
    from llmcomp.formats.verify import check

    for name, case in cases.items():
        found[name]["imported"] = imported
        try:
            verification = check(Path(case["output"]), Path(case["witness"]))
            found[name]["verification"] = dataclasses.asdict(verification)
        except VerificationFailed as error:
            found[name]["verification"] = {"passed": False, "checks": [str(error)]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
