"""Choosing the companions of an output: each set whole from the adapter, or from the base."""

import filecmp
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from converters.models.companions.companion import Companion, Companions, LeftOut, refuse_unreadable
from converters.models.companions.encoding import in_plain_utf8
from converters.models.companions.folder import Folder
from converters.models.companions.names import (
    BASE_ONLY,
    GENERATION,
    PROCESSOR,
    SENTENCES,
    TEMPLATE,
    TOKENIZER,
    is_weights,
    set_of,
)
from converters.models.companions.processor import choose_processor
from converters.models.companions.sentences import choose_head, choose_modules
from converters.models.companions.template import settle_templates
from converters.models.companions.tokenizer import is_whole


def choose_companions(
    base: Path, adapter: Path | None, written: Collection[str] = (), *, known_only: bool = False
) -> Companions:
    """The files that an output gets besides its weights, and those that it does not get.

    Training may have changed tokenizer, template or processor, so that the adapter's sets take precedence, where they
    are whole.

    Args:
        base: the folder of the base.
        adapter: the folder of the adapter; None for one that is a single file.
        written: files of the base that the output has versions of its own of, such as its config and its weights.
        known_only: do not name files of the base that are no companions: of a base on the Hub, they are there or not.

    Raises:
        CheckpointError, AdapterError: a file may not be read, or is only a Git LFS pointer.
    """
    theirs, own = Folder("base", base), Folder("adapter", adapter)
    modules, module_notes = choose_modules(theirs, own)
    head, head_notes = choose_head(theirs, own)
    files = {
        **_simple(theirs, BASE_ONLY),
        **_simple(own if own.sets[GENERATION] else theirs, GENERATION),
        **_tokenizer(theirs, own),
        **choose_processor(theirs, own),
        **modules,
        **head,
    }
    files = settle_templates(files, theirs, own)
    refuse_unreadable(files)
    files = in_plain_utf8(files)
    unused = list(_unused(own, files, theirs))
    left_out = (*_missing(theirs, files, written, known_only), *unused)
    notes = [f"the adapter's {one.name} is left out: {one.why}" for one in unused]
    return Companions(files, left_out, (*module_notes, *head_notes, *notes))


def adapter_companions(adapter: Path | None) -> Companions:
    """What an adapter in another format gets of the files beside the adapter: all of them, as they are."""
    own = Folder("adapter", adapter)
    files = {
        name: Companion(own.side, path)
        for kind, found in own.sets.items()
        if kind != BASE_ONLY
        for name, path in found.items()
    }
    files |= choose_modules(Folder("base", None), own)[0]
    refuse_unreadable(files)
    return Companions(in_plain_utf8(files))


def _simple(folder: Folder, kind: str) -> dict[str, Companion]:
    return {name: Companion(folder.side, path) for name, path in folder.sets[kind].items()}


def _tokenizer(base: Folder, adapter: Folder) -> dict[str, Companion]:
    own, others = adapter.sets[TOKENIZER], base.sets[TOKENIZER]
    # parts that are the same in the base are parts of the base's tokenizer
    part_of_base = own.keys() < others.keys() and _same(own, others)
    if not own or part_of_base or not is_whole(own.keys(), others.keys()):
        return _simple(base, TOKENIZER) if others else _simple(adapter, TOKENIZER)
    return _simple(adapter, TOKENIZER)


def _same(some: Mapping[str, Path], others: Mapping[str, Path]) -> bool:
    return all(name in others and filecmp.cmp(path, others[name], shallow=False) for name, path in some.items())


def _missing(
    base: Folder, files: Mapping[str, Companion], written: Collection[str], known_only: bool
) -> Iterator[LeftOut]:
    """What the base has and the output has not."""
    used = {name.split("/")[0] + "/" for name in files if "/" in name}
    inside = [name for found in base.sets.values() for name in found if "/" in name]
    folders = {name.split("/")[0] + "/" for name in inside}
    for name in (*base.entries, *inside):
        if name in files or name in written or name in used or name in folders:
            continue
        kind = set_of(name)
        if kind is not None or not known_only:
            yield LeftOut(base.side, name, _why(name, kind))


def _why(name: str, kind: str | None) -> str:
    if kind == SENTENCES:
        return "the modules of sentence-transformers come from the adapter, or are left out"
    if kind is not None:
        return f"the adapter brings its own {kind}"
    if is_weights(name):
        return "weights without the adapter"
    return "not a file that a loaded model needs"


def _unused(adapter: Folder, files: Mapping[str, Companion], base: Folder) -> Iterator[LeftOut]:
    """What the adapter has of sets that come from the base."""
    used = {one.source for one in files.values() if one.side == adapter.side}
    whys = {
        TOKENIZER: "a tokenizer without its vocabulary; the base's is carried whole",
        PROCESSOR: "a processor without its parts; the base's is carried whole",
        SENTENCES: "not all of sentence-transformers' modules; the base's are carried",
        TEMPLATE: "a chat template that nothing reads",
    }
    for kind, found in adapter.sets.items():
        for name, path in found.items():
            same = _same({name: path}, base.sets[kind])
            if kind != BASE_ONLY and path not in used and not same:
                yield LeftOut(adapter.side, name, whys.get(kind, f"the {kind} comes from the base"))
