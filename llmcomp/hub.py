"""From what a user calls a model to a directory with its files: sample, local directory, alias, cache or Hub.

Nothing here imports torch or transformers, so that a name that leads nowhere is told within two seconds. The
Hub is asked once (llmcomp.network); where it does not answer, its cache is used. Only safetensors weights,
JSON
and tokenizer files are ever downloaded: no pickles, and code only for those who trust it.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.aliases import ALIASES
from llmcomp.downloading import Entry, fetch, require_as_downloaded, require_as_verified
from llmcomp.errors import BadCheckpoint, ModelNotFound
from llmcomp.network import Unreachable, ask, endpoint
from llmcomp.progress import Progress, Silent
from llmcomp.samples import PREFIX, SAMPLES, sample_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack)")
_SMALL = re.compile(
    r"[^/]+\.(json|txt|model|spm|tiktoken|jinja)|additional_chat_templates/[^/]+\.jinja"
    r"|README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*"  # what the source's card says is inherited
)
_MODULE = re.compile(
    r"\d+_\w+/[^/]+\.(json|txt|safetensors)"
)  # of sentence-transformers: 1_Pooling/config.json
_ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # beside packed weights
_INNER = re.compile(r"0_\w+/config\.json")
_REPO = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_OFFLINE_WORKS = "what works offline: sample:lm, sample:classifier, or a directory with a local model"


@dataclass(frozen=True)
class Resolved:
    """Where a model lies.

    Attributes:
        path: directory with config.json and, unless only the config was asked for, safetensors weights.
        name: short and without slashes, for naming outputs.
        revision: commit on the Hub, None for what does not come from there.
        origin: 'local', 'sample', 'cache' (the Hub was not asked or did not answer) or 'hub'.
        source: the directory, sample or Hub id that the name led to.
    """

    path: Path
    name: str
    revision: str | None
    origin: str
    source: str


def resolve(
    model: str,
    *,
    revision: str | None = None,
    config_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Resolved:
    """Find the files of `model`, downloading what is missing.

    Args:
        model: 'sample:…', a local directory, an alias (llmcomp.aliases), or a Hub id.
        revision: branch, tag or commit on the Hub; default main.
        config_only: config and tokenizer will do, no weights.
        allow_pickle: pickled weights in a local directory will do; from the Hub they are never taken.
        trust_remote_code: Python files come along; without it they are never downloaded.
        progress: hears of downloads and of falling back to the cache.

    Raises:
        ModelNotFound: no such directory, sample or repository; no access; or neither cached nor reachable.
        BadCheckpoint: config or safetensors weights missing (or only pickled).
        RunError: a download that broke off.
    """
    progress = progress or Silent()
    if model.startswith(PREFIX):
        return Resolved(sample_path(model), model.replace(":", "-"), None, "sample", model)
    path = Path(model).expanduser()
    if path.is_dir():
        _require_files(path, f"{model}", config_only, allow_pickle)
        return Resolved(path, path.resolve().name, None, "local", str(path.resolve()))
    if path.exists():
        raise ModelNotFound(
            f"{model} is a file; expected a directory with config.json and safetensors weights."
        )
    if not _REPO.fullmatch(model):
        raise ModelNotFound(
            f"There is no directory {model!r}; expected a local model or a Hub id like org/name."
        )
    alias = ALIASES.get(model.lower())
    return _from_hub(model, alias.repo if alias else model, revision, config_only, trust_remote_code, progress)


def cached(repo: str, revision: str | None = None, *, config_only: bool = False) -> Path | None:
    """The complete snapshot of `repo` in the local cache (config.json, and every weight file), or None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    path = Path(config).parent
    return path if config_only or not missing_weights(path) else None


def missing_weights(path: Path) -> list[str]:
    """Names of the weight files that the checkpoint in `path` needs and does not have.

    Raises:
        BadCheckpoint: an index that is no index.
    """
    if (path / SINGLE).is_file():
        return []
    if not (path / INDEX).is_file():
        return [SINGLE]
    try:
        files = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(
            f"{path / INDEX} is not an index of weights; download the model again."
        ) from error
    return sorted(name for name in files if not (path / str(name)).is_file())


def suggestions(model: str) -> str:
    """'; did you mean …?' with the nearest known names, or nothing."""
    known = {**{name: name for name in SAMPLES}, **{name: name for name in ALIASES}}
    known |= {alias.repo.lower(): alias.repo for alias in ALIASES.values()}
    known |= {alias.repo.split("/")[1].lower(): alias.repo for alias in ALIASES.values()}
    near = [known[n] for n in difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.7)]
    near = [name for name in dict.fromkeys(near) if name != model]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _require_files(path: Path, what: str, config_only: bool, allow_pickle: bool = False) -> None:
    names = sorted(entry.name for entry in path.iterdir())
    if "config.json" not in names:
        _refuse_inner(what, [file.relative_to(path).as_posix() for file in path.glob("0_*/config.json")])
        found = ", ".join(names[:5]) or "nothing"
        raise BadCheckpoint(
            f"{what} has no config.json (found: {found}); expected a Hugging Face model directory."
        )
    if config_only:
        return
    missing = missing_weights(path)
    if missing == [SINGLE]:
        if allow_pickle and any(_PICKLE.fullmatch(name) for name in names):
            return
        raise BadCheckpoint(_no_safetensors(what, names, "; or trust them with --allow-pickle"))
    if missing:
        raise BadCheckpoint(
            f"{what} lacks {len(missing)} of the files that its {INDEX} names (first: {missing[0]}); "
            "copy or download the model again."
        )


def _refuse_inner(what: str, files: list[str]) -> None:
    """sentence-transformers once saved the transformer in a folder of its own, 0_Transformer or 0_BERT."""
    inner = next((name.split("/")[0] for name in files if _INNER.fullmatch(name)), None)
    if inner is not None:
        raise BadCheckpoint(
            f"{what} keeps its transformer in {inner}/; move the files of that folder up beside modules.json, "
            f'write "path": "" there instead of "path": "{inner}", and run the command again.'
        )


def _no_safetensors(what: str, names: list[str], otherwise: str = "") -> str:
    pickles = [name for name in names if _PICKLE.fullmatch(name)]
    if pickles:
        return (
            f"{what} has no {SINGLE}, only {', '.join(pickles[:3])}: such files can run code when loaded "
            f"and are not read; convert it once with save_pretrained and give that directory{otherwise}."
        )
    return f"{what} has no weights: expected {SINGLE}, or {INDEX} with its shards, beside config.json."


def _from_hub(
    model: str, repo: str, revision: str | None, config_only: bool, code: bool, progress: Progress
) -> Resolved:
    from huggingface_hub import errors

    what = model if model == repo else f"{model} ({repo})"
    name = repo.split("/")[-1]
    try:
        info = _info(what, model, repo, revision)
    except Unreachable as error:
        path = cached(repo, revision, config_only=config_only)
        if path is None:
            raise ModelNotFound(_not_reachable(what, model, repo, revision, str(error))) from error
        progress.note(f"{what} comes from the cache, commit {path.name[:12]} ({error}).")
        if not config_only:
            require_as_downloaded(what, path, progress)
        return Resolved(path, name, path.name, "cache", repo)
    files = [entry["rfilename"] for entry in info["siblings"]]
    wanted = _wanted(what, files, config_only) + [name for name in files if code and name.endswith(".py")]
    entries = {entry["rfilename"]: Entry.of(entry) for entry in info["siblings"]}
    try:
        path = fetch(what, repo, revision, info["sha"], {name: entries[name] for name in wanted}, progress)
    except errors.GatedRepoError as error:
        raise ModelNotFound(_gated(what, repo)) from error
    require_as_verified(what, path, entries, progress)
    _require_files(path, what, config_only)
    return Resolved(path, name, path.name, "hub", repo)


def _info(what: str, model: str, repo: str, revision: str | None) -> dict[str, Any]:
    """What the Hub says of the repository at the revision: {"sha", "siblings": [{"rfilename", "size"}]}."""
    from urllib.parse import quote

    from huggingface_hub import errors
    from huggingface_hub.utils import hf_raise_for_status

    answer = ask(
        f"{endpoint()}/api/models/{repo}/revision/{quote(revision or 'main', safe='')}",
        params={"blobs": "true"},
    )
    try:
        hf_raise_for_status(answer)
        info = answer.json()
        if not isinstance(info, dict) or "sha" not in info or "siblings" not in info:
            raise Unreachable(f"{endpoint()} gave no description of the model")
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{what} has no revision {revision!r} on the Hub; use a branch, tag or commit."
        ) from error
    except errors.GatedRepoError as error:
        raise ModelNotFound(_gated(what, repo)) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(_not_there(model, repo)) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ModelNotFound(_gated(what, repo)) from error
        raise Unreachable(f"{endpoint()} answered {error.response.status_code}") from error
    except ValueError as error:  # a login page of the local network instead of JSON
        raise Unreachable(f"{endpoint()} did not answer as a Hub") from error
    return info


def _not_there(model: str, repo: str) -> str:
    if model != repo:
        return f"{model} stands for {repo}, which {endpoint()} has not, or shows only after `hf auth login`."
    return (
        f"{model} is neither a local directory, nor an alias (`llmcomp models` lists them), nor a repository "
        f"that you can see on the Hub; a private one needs `hf auth login`{suggestions(model) or '.'}"
    )


def _gated(what: str, repo: str) -> str:
    return (
        f"The Hub refuses access to {what}; accept its terms on {endpoint()}/{repo} if it is gated, then run "
        "`hf auth login` with a token that may read it."
    )


def _not_reachable(what: str, model: str, repo: str, revision: str | None, why: str) -> str:
    from huggingface_hub import constants

    state = f"neither cached (in {constants.HF_HUB_CACHE})"
    if (partial := cached(repo, revision, config_only=True)) is not None:
        state = f"neither wholly cached ({partial} lacks {missing_weights(partial)[0]})"
    asked = f" at revision {revision}" if revision else ""
    near = "" if model.lower() in ALIASES else suggestions(model).rstrip("?")
    return f"{what}{asked} is {state} nor reachable ({why}){near}; {_OFFLINE_WORKS}."


def _wanted(what: str, files: list[str], config_only: bool) -> list[str]:
    """The files worth downloading; raises BadCheckpoint where config or safetensors weights are missing."""
    if "config.json" not in files:
        _refuse_inner(f"{what} on the Hub", files)
        raise BadCheckpoint(f"{what} has no config.json on the Hub; expected a transformers model.")
    skip = re.compile(r"(?!model\.safetensors).*\.index\.json")
    small = [name for name in files if _SMALL.fullmatch(name) and not skip.fullmatch(name)]
    if config_only:
        return small
    # Some repositories hold both layouts, or the publisher's own beside them (consolidated.safetensors).
    weights = [SINGLE] if SINGLE in files else [name for name in files if _SHARD.fullmatch(name)]
    if not weights:
        raise BadCheckpoint(
            _no_safetensors(f"{what} on the Hub", [name for name in files if "/" not in name])
        )
    modules = [name for name in files if _MODULE.fullmatch(name)] if "modules.json" in files else []
    return small + weights + modules + [name for name in files if name in _ADAPTER]
