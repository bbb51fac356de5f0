"""`llmcomp quantize` in this process, for the tests of what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import LENGTH, SAMPLES

from llmcomp.cli.main import main
from llmcomp.formats.save import partial_of

QUICK = ["--no-evaluate", "--no-verify", "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
ONE_FILE = "model.safetensors"


class Command:
    """`llmcomp quantize MODEL … -o OUTPUT`, in this process."""

    def __init__(self, output: Path, text: Path, captured: pytest.CaptureFixture[str]) -> None:
        self.output, self.text, self._captured = output, text, captured

    def run(self, model: Path | str, *more: str) -> tuple[int, str]:
        """Exit status and stderr; `--calibration` may be given in `more`."""
        given = [] if {"--calibration", "--recipe"} & set(more) else ["--calibration", str(self.text)]
        options = [] if "--recipe" in more else QUICK
        self._captured.readouterr()
        status = main(["quantize", str(model), *options, *given, *more, "-o", str(self.output)])
        printed, said = self._captured.readouterr()
        assert printed == "" or status == 0
        return status, said

    def refused(self, status: int, model: Path | str, *more: str) -> str:
        """The one sentence, after checking that it is one and that no output is there."""
        got, said = self.run(model, *more)
        sentences = [line for line in said.splitlines() if line.startswith("llmcomp: ")]
        assert got == status, said
        assert len(sentences) == 1 and said.splitlines()[-1] == sentences[0], said
        assert "Traceback" not in said and "Unexpected failure" not in said
        assert sentences[0].endswith((".", "?"))
        assert not self.output.exists()
        return sentences[0].removeprefix("llmcomp: ")


def untouched(command: Command) -> bool:
    """Whether not even a partial directory was begun."""
    return not partial_of(command.output).exists()


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
