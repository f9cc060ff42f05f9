"""What a state is worth: whether its records and every kept θ can be used, and what a restart would lose."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters import __version__, load_adapter
from converters.errors import OptionError, PeanutError
from peanut_serve.variants.backup.archive import Contents, opened_archive
from peanut_serve.variants.roots import AdapterRoots, looks_merged
from peanut_serve.variants.state_folder import (
    RECORDS,
    Record,
    Records,
    all_digests,
    read_records,
    set_aside,
    shown_base,
)
from peanut_serve.variants.version import EVALUATION, digest_of

_KINDS = ("lora", "merged")  # how a version of an adapter may be served


@dataclass
class StateReport:
    """What was found.

    Attributes:
        schema_version: of the records, as they are on the disk.
        base: fingerprint of the base of the records.
        in_use: whether a server uses the folder now.
        versions: name -> the digests of its current and earlier versions.
        usable: digests of the versions whose θ is kept and can be used.
        problems: what is damaged, or would be lost.
        notes: what an operator may want to know.
    """

    schema_version: int
    base: str
    in_use: bool = False
    versions: dict[str, list[str]] = field(default_factory=dict)
    usable: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_archive(archive: Path) -> tuple[Contents, StateReport]:
    """Read an archive whole, and compare it with its list; nothing is written.

    Raises `OptionError` if it is no archive, is damaged, or is of a newer version.
    """
    with opened_archive(archive) as opened:
        opened.read()
        contents = opened.contents
    report = StateReport(contents.schema_version, contents.base, usable=sorted(contents.thetas))
    if not _evaluates_alike(contents.package_version):
        report.notes.append(
            f"it was written by version {contents.package_version}; this is {__version__}, whose results are those "
            f"of {EVALUATION}: it reads the adapters again, and cannot return to the earlier versions"
        )
    return contents, report


def _evaluates_alike(version: str) -> bool:
    """Whether a version of this package gave adapters the digests that this one gives them."""
    try:
        own, other, first = (tuple(map(int, one.split("."))) for one in (__version__, version, EVALUATION))
    except ValueError:
        return version == __version__
    return first <= other <= own


def check_state(folder: Path, base: str | None = None, roots: Sequence[str] = ()) -> StateReport:
    """Open the records and every kept θ; nothing is written, and a running server is not disturbed.

    Args:
        folder: the state folder.
        base: fingerprint of the base that will be served; records of another one would be set aside.
        roots: folders of variants and Hub ids, in which the sources of the names are looked up.

    Raises `OptionError` if there are no records, or they are damaged or of a newer version.
    """
    path = folder / RECORDS
    if not path.is_file():
        raise OptionError(f"{folder} has no {RECORDS}; check --state, or the --base that was served")
    text = path.read_bytes()
    records = read_records(text, path)
    report = StateReport(_written_schema(text), records.base, _is_in_use(folder))
    if base is not None and base != records.base:
        report.problems.append(
            f"the records are those of another base (fingerprint {shown_base(records.base)}, expected "
            f"{shown_base(base)}); a server of this base sets them aside and starts without names"
        )
    searched = AdapterRoots(roots) if roots else None
    for name, record in sorted(records.variants.items()):
        report.versions[name] = [digest for digest in [record.digest, *record.previous] if digest]
        report.problems += _losses(folder, name, record, searched)
    _check_thetas(folder, records, report)
    report.notes += _beside(folder, records)
    return report


def _written_schema(text: bytes) -> int:
    return Records.model_validate_json(text).schema_version


def _is_in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _losses(folder: Path, name: str, record: Record, roots: AdapterRoots | None) -> Iterator[str]:
    """What would be lost of a name, if the folders of variants are known."""
    if roots is None or record.hidden:
        return
    source = roots.find(record.source)
    if source is None:
        yield f"{name}: its source {record.source} is not in the folders of variants, so requests for it get a 404"
    elif isinstance(source.spec, Path) and not looks_merged(source.spec):
        for digest in record.previous:
            if not (folder / "theta" / digest).is_dir():
                yield f"{name}: the θ of version {digest[:12]} is missing, so it cannot be rolled back to"


def _check_thetas(folder: Path, records: Records, report: StateReport) -> None:
    for digest in sorted(all_digests(records.variants)):
        kept = folder / "theta" / digest
        if not kept.is_dir():
            report.notes.append(f"version {digest[:12]} has no copy of θ, as that of a merged folder")
        elif (problem := _theta_problem(kept, digest, records.base)) is not None:
            report.problems.append(f"version {digest[:12]} {problem}")
        else:
            report.usable.append(digest)


def _theta_problem(kept: Path, digest: str, base: str) -> str | None:
    """Why a kept θ cannot be used; None if it can."""
    files = list(kept.iterdir())
    try:
        adapter = load_adapter(files[0] if len(files) == 1 else kept)
    except (PeanutError, OSError) as error:
        return f"cannot be opened: {' '.join(str(error).split())}"
    if digest in {digest_of(kind, adapter.digest, base) for kind in _KINDS}:
        return None
    return (
        f"is damaged, or was kept by a version of peanut-serve with other results than those of {EVALUATION}: "
        "its digest is another"
    )


def _beside(folder: Path, records: Records) -> Iterator[str]:
    """What else is in the folder."""
    known = all_digests(records.variants)
    for path in sorted(set_aside(folder)):
        try:
            aside = read_records(path.read_bytes(), path)
        except OptionError as error:
            yield str(error)
            continue
        known |= all_digests(aside.variants)
        yield f"{path.name} has the records of {len(aside.variants)} variants of another base"
    theta = folder / "theta"
    if others := sorted(path.name for path in theta.iterdir() if path.name not in known) if theta.is_dir() else []:
        yield f"theta has {len(others)} folders that no record names; the next start removes them"
