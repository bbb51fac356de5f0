"""How sentence-transformers lays a model out: modules.json names the parts and the folders that they lie in.

The transformer lies at the top of the directory like any other model, pooling and what else follows it in
folders of their own (1_Pooling, 2_Dense). Source: sentence_transformers/base/model.py, version 6.2.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmcomp.errors import BadCheckpoint
from llmcomp.shards import AGAIN, read_json_object

MODULES, SETTINGS = "modules.json", "sentence_bert_config.json"
_OWN = "sentence_transformers."


def sentence_modules(path: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module that modules.json names; none where the directory has no such file.

    Names of sentence-transformers' own classes come without their packages, which changed between versions.

    Raises:
        BadCheckpoint: a file that is not a list of modules.
    """
    file = path / MODULES
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(module.get("type", "")), str(module["path"])) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"{file} is not a list of modules with paths ({error}); {AGAIN}.") from error
    return [(kind.rpartition(".")[2] if kind.startswith(_OWN) else kind, folder) for kind, folder in found]


def is_sentence_encoder(path: str | Path) -> bool:
    """Whether a directory's transformer is there for its hidden states: sentence-transformers then loads the
    bare model, whatever head config.json's architecture has.

    Not so for its cross-encoders and sparse encoders, which use their heads.

    Raises:
        BadCheckpoint: files that cannot be read.
    """
    path = Path(path)
    if sentence_modules(path)[:1] != [("Transformer", "")]:
        return False
    settings = read_json_object(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    return settings.get("transformer_task", "feature-extraction") == "feature-extraction"
