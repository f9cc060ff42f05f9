"""The adapters that exist when a server starts: vLLM's options and the notes for operators follow from them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from converters import load_adapter, open_checkpoint
from converters.errors import OptionError, PeanutError
from peanut_serve.settings.serving import Mode
from peanut_serve.variants.lora_export import kind_of
from peanut_serve.variants.roots import AdapterRoots, looks_merged
from peanut_serve.variants.state_folder import RECORDS, Record, Records, read_records, set_aside

MIN_RANK = 16  # room for adapters that are added later
_SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Found:
    """The adapters that exist when the server starts.

    Attributes:
        ranks: name -> largest rank of the adapter.
        kinds: last parts of the names of the modules they update.
        broken: name -> why it cannot be read.
        merged: names of folders with merged models.
        not_lora: name -> method of each adapter without exact low-rank factors, which can only be merged.
    """

    ranks: Mapping[str, int]
    kinds: frozenset[str]
    broken: Mapping[str, str]
    merged: tuple[str, ...] = ()
    not_lora: Mapping[str, str] = field(default_factory=dict)

    def names(self, mode: Mode) -> list[str]:
        """Names that requests can use."""
        return sorted([*self.ranks, *((*self.merged, *self.not_lora) if mode != "lora" else ())])

    def notes(self, mode: Mode) -> Iterator[str]:
        """Notes for the operator."""
        for name, reason in self.broken.items():
            yield f"{name} will not be served: {reason}"
        if mode == "lora":
            for name in self.merged:
                yield f"{name} will not be served: it is a merged model; --mode merged or auto serves it"
            for name, method in self.not_lora.items():
                yield (
                    f"{name} will not be served: its update ({method}) cannot be expressed as LoRA; "
                    "--mode merged or auto serves it"
                )
            if not self.ranks:
                yield f"there are no LoRA adapters yet; vLLM starts with room for rank {MIN_RANK}"


def find_adapters(roots: AdapterRoots) -> Found:
    """Open every adapter in the roots, downloading those on the Hub."""
    ranks: dict[str, int] = {}
    kinds: set[str] = set()
    broken: dict[str, str] = {}
    merged: list[str] = []
    not_lora: dict[str, str] = {}
    for name in roots.names():
        try:
            source = roots.find(name)
            if source is None:
                continue  # removed in the meantime
            if isinstance(source.spec, Path) and looks_merged(source.spec):
                merged.append(name)
                continue
            adapter = load_adapter(source.spec)
        except (PeanutError, OSError) as error:
            broken[name] = " ".join(str(error).split())
            continue
        found = {module: adapter.rank(module) for module in adapter.modules}
        inexact = [module for module, rank in found.items() if rank is None]
        if inexact or not found:
            not_lora[name] = adapter.describe(inexact[0]).name if inexact else "tensors replaced whole"
            continue
        ranks[name] = max(rank for rank in found.values() if rank is not None)
        kinds |= set(map(kind_of, adapter.modules))
    return Found(ranks, frozenset(kinds), broken, tuple(merged), not_lora)


def unserved(asked: Mapping[str, Collection[str]], names: Collection[str]) -> Iterator[str]:
    """Why a start would fail for variants that options name: one text for each.

    Args:
        asked: option -> the names in it.
        names: that requests can use.
    """
    known = sorted(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    for option, wanted in asked.items():
        for name in sorted(set(wanted) - set(names)):
            yield f"--{option} {name}: there is no such variant among {', '.join(known[:_SHOWN]) or 'none'}{more}"


def usable_names(found: Found, mode: Mode, roots: AdapterRoots, state: Path, base: str) -> set[str]:
    """Names that requests can use: of adapters, and of those that operators registered, without those they removed.

    Files that cannot be served now do not matter for a name whose version the state folder keeps. The records of
    another base do not count; if the base is not in a folder, they cannot be told from its own, and add names only.

    Args:
        found: in the roots.
        mode: of the server.
        roots: where adapters are looked up.
        state: the state folder; records that cannot be read count nothing here, and are refused by the server.
        base: as it is given to the server.
    """
    names, known, fingerprint = set(found.names(mode)), [*_all_records(state)], _fingerprint(base)
    own = [records for records in known if records.base == fingerprint]
    recorded = [one for records in (known if fingerprint is None else own) for one in records.variants.items()]
    served = {name for name, record in recorded if record.source in names or _keeps_version(record, found, roots)}
    hidden = {name for records in own for name, record in records.variants.items() if record.hidden}
    return (names | served) - hidden


def _all_records(state: Path) -> Iterator[Records]:
    for path in (state / RECORDS, *set_aside(state)):
        with suppress(PeanutError, OSError):
            yield read_records(path.read_bytes(), path)


def _fingerprint(base: str) -> str | None:
    """Of a base in a folder; None if it is elsewhere, or cannot be read."""
    folder = Path(base).expanduser()
    with suppress(PeanutError, OSError):
        return open_checkpoint(folder).fingerprint if folder.is_dir() else None
    return None


def _keeps_version(record: Record, found: Found, roots: AdapterRoots) -> bool:
    """Whether a start takes the version of a record, whatever its files are; see `Catalogue.current`."""
    try:
        source = roots.find(record.source) if record.digest is not None else None
    except OptionError:  # the name is in two folders
        return False
    if source is None or not source.state():
        return False
    return record.held or (record.source in found.broken and source.state() == record.seen)
