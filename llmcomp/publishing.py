"""A checkpoint that llmcomp wrote, with its card, to the Hub: what is refused, what goes along, what is said before.

Refused is what was not verified, or is not any more what was verified (`llmcomp.digests`). What goes along is the
checkpoint with its tokenizer, the recipe, the report and its page without the directories of this machine, and the card
with its plots; a README.md that lies in the directory is the card instead.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from llmcomp import licences
from llmcomp.digests import difference
from llmcomp.errors import BadCheckpoint, UserError
from llmcomp.export_record import RECORD_NAME, ExportRecord
from llmcomp.progress import Progress, Silent
from llmcomp.provenance import front_matter
from llmcomp.report import card as cards
from llmcomp.report.public import public, public_export, public_text
from llmcomp.report.schema import FILE_NAME, Report
from llmcomp.report.summary import DISTILL_NAME, PLAN_NAME
from llmcomp.staging import large, stage
from llmcomp.uploading import Content, Parcel, Remote

_TOKENIZER = "tokenizer.json"
_TEXTS = ("llmcomp_recipe.yaml",)  # it names calibration text
PLANS = (PLAN_NAME, DISTILL_NAME)
Whole = Report | ExportRecord  # what says which files were verified


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now.

    Attributes:
        repo: its name. commit: the commit that holds it. url: of the commit, or of the pull request.
        files: how many there are. sent: which of them were new there.
    """

    repo: str
    commit: str
    url: str
    files: int
    sent: tuple[str, ...]


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Publish a checkpoint or an export that llmcomp wrote on the Hub, with recipe, report and card, all of it at once.

    It is one commit, or, where that would be too large, one merge of a pull request. Broken off, the same call resumes:
    what has arrived is not sent again. The directory is only read.

    Args:
        directory: the checkpoint.
        repo: 'user/name' or 'organization/name'; made where it is missing.
        private: make it so that only its owners see it.
        revision: a branch, made where it is missing; default main.
        create_pr: as a pull request, which somebody merges.
        message: of the commit.
        progress: hears of the licence, of waits and of what is sent.

    Raises:
        UserError: no checkpoint of llmcomp, not verified or changed since, no token or rights, a name that is taken.
        RunError: the connection, or the Hub, failed for good; nothing half is visible there.
    """
    directory, progress = Path(directory), progress or Silent()
    if revision is not None and create_pr:
        raise UserError("A pull request goes to main; leave out --revision, or --create-pr.")
    whole = exported(directory) if (directory / RECORD_NAME).is_file() else require_verified(directory)
    kept = f"{directory} is whole and as it was; `llmcomp push {directory} {repo}` resumes."
    remote = Remote(repo, kept, progress)
    remote.prepare(private, revision)
    for sentence in about_licence(whole):
        progress.note(sentence)
    files, hashes = contents(directory, whole, repo)
    text = message or f"{source_of(whole)}, {_made(whole)} by llmcomp {whole.llmcomp_version}"
    parcel = Parcel(files, hashes, text, revision, create_pr)
    changes = remote.changes(parcel)
    done = stage(remote, parcel, changes) if large(parcel, changes) else remote.commit(parcel, changes)
    return PushResult(repo, done.commit, done.url, len(files), done.sent)


def ready(repo: str, private: bool = False) -> None:
    """Refuse before hours of work what `push` would refuse after them.

    Raises:
        UserError, RunError: as `push`, of name, token, rights, connection and what is there.
    """
    Remote(repo, "Nothing was done yet.", Silent()).require_free(private)


def require_verified(directory: Path) -> Report:
    """The report of a checkpoint, if it was verified and is still that checkpoint.

    Raises:
        BadCheckpoint: no report, not verified, or other bytes than those that were.
    """
    report = Report.read(directory)
    if report.verification is None or not report.verification.passed:
        raise BadCheckpoint(
            f"{directory} was not verified, so it is not pushed; compress it again without --no-verify."
        )
    if not report.files:
        raise BadCheckpoint(
            f"{FILE_NAME} of {directory} does not say which files were verified; compress it again by this llmcomp."
        )
    _require_same(directory, report.files, FILE_NAME, "compress it again")
    return report


def exported(directory: Path) -> ExportRecord:
    """What is known of an export, if it is still what was compared with the checkpoint that it was made of.

    Raises:
        BadCheckpoint: no record, or other bytes than those that were.
    """
    record = ExportRecord.read(directory)
    _require_same(directory, record.files, RECORD_NAME, "export it again")
    return record


def _require_same(directory: Path, files: dict[str, str], said: str, remedy: str) -> None:
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise BadCheckpoint(f"{said} of {directory} names {outside[0]}, which is not in it.")
    changed = difference(directory, files)
    if changed is not None:
        raise BadCheckpoint(f"{directory} is not what was verified, so it is not pushed: {changed}; {remedy}.")


def contents(directory: Path, whole: Whole, repo: str) -> tuple[dict[str, Content], dict[str, str]]:
    """{path there: file or bytes} of all that is pushed, and {path: SHA-256} of what was verified.

    Recipe and report go without the directories of this machine, so the recipe may have another hash than here.
    """
    files: dict[str, Content] = {name: directory / name for name in whole.files}
    report = whole if isinstance(whole, Report) else whole.report
    for name in (*_TEXTS, *PLANS):
        if report is not None and (directory / name).is_file():
            files[name] = public_text((directory / name).read_text(encoding="utf-8"), report).encode()
    known = {name: _sha256(files[name]) if isinstance(files[name], bytes) else digest
             for name, digest in whole.files.items()}  # fmt: skip
    return files | _about(replace(_public(whole), files=known)) | _card_files(directory, repo, whole), known


def _about(shown: Whole) -> dict[str, Content]:
    """Report and page, or the record of an export."""
    from llmcomp.report.html import FILE_NAME as PAGE_NAME
    from llmcomp.report.html import render

    if isinstance(shown, ExportRecord):
        return {RECORD_NAME: shown.to_json().encode()}
    return {FILE_NAME: shown.to_json().encode(), PAGE_NAME: render(shown).encode()}


def _public(whole: Whole) -> Whole:
    return public(whole) if isinstance(whole, Report) else public_export(whole)


def _card_files(directory: Path, repo: str, whole: Whole) -> dict[str, Content]:
    """README.md, the owner's where there is one, and the plots that the card shows."""
    own = directory / cards.FILE_NAME
    made = card_of(directory, repo, whole)
    if not own.is_file():
        return {cards.FILE_NAME: made.text.encode(), **made.images}
    if not front_matter(own.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{own} has no metadata at its top (YAML between lines of ---); remove it, or add them.")
    return {cards.FILE_NAME: own, **made.images}


def _sha256(content: Content) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()


def card_of(directory: Path, name: str, whole: Whole | None = None) -> cards.Card:
    """The card of the checkpoint, or export, in `directory`, to be loaded as `name`.

    Raises:
        BadCheckpoint: neither a report nor a record of an export there.
    """
    if whole is None:
        is_export = (directory / RECORD_NAME).is_file()
        whole = ExportRecord.read(directory) if is_export else Report.read(directory)
    if isinstance(whole, Report):
        return cards.card(public(whole), name, gguf=_gguf(directory, whole))
    from llmcomp.report import export_card

    sizes = {path: (directory / path).stat().st_size for path in sorted(whole.files) if (directory / path).is_file()}
    return export_card.card(public_export(whole), name, sizes)


def about_licence(whole: Whole) -> list[str]:
    """What is said of the source's licence before anything is published."""
    origin = whole.origin
    name = origin.license if origin else None
    shown = f"Licence of the source, {source_of(whole)}: {name or 'not named in its card'}."
    found = licences.warning(name, origin.license_name if origin else None)
    return [shown, *([found] if found else [])]


def source_of(whole: Whole) -> str:
    """The model that was compressed, as others know it."""
    from llmcomp.report import export_card

    return cards.source_name(whole) if isinstance(whole, Report) else export_card.source_name(public_export(whole))


def _made(whole: Whole) -> str:
    if isinstance(whole, Report):
        return "compressed"
    return f"{'compressed and ' if whole.report else ''}exported as {whole.form}"


def _gguf(directory: Path, report: Report) -> bool:
    """Whether llama.cpp's format has a form for it, as far as its architecture and its tokenizer say."""
    from llmcomp.exports.gguf_models import FAMILIES

    integers = all(layer.scheme.split()[0] in ("int4", "int8") for layer in report.layers)
    return report.architecture in FAMILIES and integers and (directory / _TOKENIZER).is_file()


