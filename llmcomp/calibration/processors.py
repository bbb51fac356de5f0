"""What turns images and sound into a model's inputs: transformers' own processors, loaded from beside the weights.

Processors that read videos as well (Qwen2-VL, SmolVLM) ask for torchvision, which images do without: where it is not
installed they are put together from their other parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcomp.errors import BadData
from llmcomp.feeds import composite
from llmcomp.tokenizing import forgetful

_AUTO = {"images": "AutoImageProcessor", "sound": "AutoFeatureExtractor"}
_VIDEO = "video_processor"


def load_processor(directory: Path, model: Any, kind: str) -> Any:
    """An image processor, a processor of images and text, or (feature extractor, tokenizer) for sound.

    Args:
        directory: with the processor's files. model: whose inputs it makes. kind: 'images' or 'sound'.

    Raises:
        BadData: its files are not there, or it needs a package that is not.
    """
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # that torchvision is not there is nothing to be told
    try:
        if composite(model):
            return _images_and_text(directory, model.config)
        found = _load(_AUTO[kind], directory)
        return found if kind == "images" else (found, _load("AutoTokenizer", directory))
    except ImportError as error:
        raise BadData(
            f"The processor of {directory} needs a package that is not installed here: {_reason(error)}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(
            f"{directory} has no processor that makes the model's inputs of {kind} ({_reason(error)}); add its "
            "preprocessor_config.json (and tokenizer) to the directory."
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(level)


def prompt(text: str, processor: Any, config: Any) -> str:
    """The text with the word that stands for one image, before it where it has none. Most processors put what else
    belongs around an image; Qwen's leaves its beginning and end to the chat template."""
    token = str(getattr(processor, "image_token", "<image>"))
    if token in text:
        return text
    ends = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    if None not in ends:
        first, last = processor.tokenizer.convert_ids_to_tokens(ends)
        token = f"{first}{token}{last}"
    return f"{token}\n{text}"


def _images_and_text(directory: Path, config: Any) -> Any:
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or _VIDEO not in kind.get_attributes() or transformers.utils.is_torchvision_available():
        found = _load("AutoProcessor", directory)
        if not (hasattr(found, "image_processor") and hasattr(found, "tokenizer")):
            raise ValueError(f"there is a {type(found).__name__} alone")
        return found

    class WithoutVideos(kind):  # type: ignore[misc]
        """Takes None for the part that needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": "AutoImageProcessor", "tokenizer": "AutoTokenizer"}
    made = [_load(parts[name], directory) if name in parts else None for name in kind.get_attributes()]
    settings, _ = kind.get_processor_dict(str(directory), local_files_only=True)
    return WithoutVideos.from_args_and_dict(made, settings)


def _load(auto: str, directory: Path) -> Any:
    import transformers

    return forgetful(getattr(transformers, auto).from_pretrained(str(directory), local_files_only=True))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
