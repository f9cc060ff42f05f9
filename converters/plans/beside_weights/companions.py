"""What lies beside the weights of an output: the companions of the base and of the adapters."""

from collections.abc import Sequence

from converters.adapters.adapter import Adapter
from converters.files.names import INDEX_FILE, MANIFEST_NAME, MODEL_CONFIG
from converters.models.checkpoint import Checkpoint
from converters.models.companions.choice import adapter_companions, choose_companions
from converters.models.companions.companion import Companions

# files of the base that every output has versions of its own of
_WRITTEN = (MODEL_CONFIG, INDEX_FILE, MANIFEST_NAME, "README.md")


def companions_of(base: Checkpoint, adapters: Sequence[Adapter], head: Adapter) -> Companions:
    """The companions of a merge: of several adapters, those of `head` beside the base's.

    Raises `CheckpointError` or `AdapterError` if a file is only a Git LFS pointer.
    """
    folder = head.path if head.path.is_dir() else None
    written = {*_WRITTEN, *base.shards}
    chosen = choose_companions(base.folder, folder, written, known_only=base.repo_id is not None)
    notes = [note for one in adapters if one is not head for note in _others(one, head, chosen)]
    return Companions(chosen.files, chosen.left_out, (*chosen.notes, *notes))


def own_companions(head: Adapter) -> Companions:
    """The files beside an adapter, for an adapter in another format."""
    return adapter_companions(head.path if head.path.is_dir() else None)


def _others(adapter: Adapter, head: Adapter, chosen: Companions) -> list[str]:
    """A note if another adapter of the sum brings files that differ from the chosen ones."""
    found = own_companions(adapter).files
    differing = [
        name for name, one in found.items() if name not in chosen.files or chosen.files[name].read() != one.read()
    ]
    if not differing:
        return []
    return [
        f"{adapter.name} brings another {', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}; "
        f"the output has the files of {head.name} and of the base"
    ]
