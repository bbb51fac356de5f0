"""Python code that a checkpoint brings along, made known to transformers, whose Auto classes then open it as its own.

Only for a model whose code the user trusts (`--trust-remote-code`): to register a class is to run its module. Once
it is registered, every later `from_pretrained` of this process takes it, of the source and of what is made of it. A
process that is started to open either is told so, if the code there is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcomp.digests import file_sha256
from llmcomp.errors import BadCheckpoint
from llmcomp.shards import read_json_object

_trusted: set[str] = set()  # SHA-256 of files of code


def trusts(directory: Path) -> bool:
    """Whether all code in a directory is, to the byte, code that this process was told to trust: a copy of it."""
    files = _code(directory)
    return bool(files) and _trusted.issuperset(map(file_sha256, files))


def register(path: Path) -> None:
    """Run the code that config.json's `auto_map` names, and register its config and model classes.

    Raises:
        BadCheckpoint: a file that is not there, or code that fails.
    """
    import transformers

    _trusted.update(map(file_sha256, _code(path)))
    config = read_json_object(path / "config.json")
    references = config.get("auto_map") or {}
    try:
        kind = _imported(references["AutoConfig"], path) if "AutoConfig" in references else None
        if kind is None:
            return  # transformers has the config; the model's class is looked up where it is built
        transformers.AutoConfig.register(str(config.get("model_type")), kind, exist_ok=True)
        for name, reference in references.items():
            if name.startswith("AutoModel"):
                getattr(transformers, name).register(kind, _imported(reference, path), exist_ok=True)
    except Exception as error:  # it is anybody's code, and may raise anything
        reason = " ".join(str(error).split())
        raise BadCheckpoint(f"The Python code of {path} fails: {type(error).__name__}: {reason[:300]}") from error


def _code(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.py"))


def _imported(reference: Any, path: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(str(reference), str(path))
