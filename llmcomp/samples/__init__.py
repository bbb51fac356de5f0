"""The sample models and texts that ship inside the package: where they lie, and nothing else.

`sample:lm` is a causal language model, `sample:classifier` a BERT that tells which area of the standard
library a docstring is from; README.md beside this file says where they come from. No import here is heavier than pathlib.
"""

from pathlib import Path

from llmcomp.errors import ModelNotFound

__all__ = [
    "PREFIX",
    "SAMPLES",
    "calibration_text",
    "classifier_calibration",
    "classifier_validation",
    "sample_path",
    "validation_text",
]

PREFIX = "sample:"
_HERE = Path(__file__).parent
SAMPLES: dict[str, Path] = {f"{PREFIX}{name}": _HERE / name for name in ("lm", "classifier")}


def sample_path(name: str) -> Path:
    """The checkpoint directory of "sample:lm" or "sample:classifier".

    Raises:
        ModelNotFound: no sample has that name.
    """
    if name not in SAMPLES:
        known = " and ".join(sorted(SAMPLES))
        raise ModelNotFound(f"There is no sample model {name!r}; the samples are {known}.")
    return SAMPLES[name]


def calibration_text() -> Path:
    """UTF-8 text, about 0.5 MB, from modules that the samples were trained on."""
    return _HERE / "text" / "calibration.txt"


def validation_text() -> Path:
    """UTF-8 text, about 0.25 MB, from modules that were held out of training and of `calibration_text`."""
    return _HERE / "text" / "validation.txt"


def classifier_calibration() -> Path:
    """JSON lines {"text", "label", "module"} from training modules; label indexes the config's `id2label`."""
    return _HERE / "text" / "classifier_calibration.jsonl"


def classifier_validation() -> Path:
    """JSON lines as in `classifier_calibration`, from the held-out modules."""
    return _HERE / "text" / "classifier_validation.jsonl"
