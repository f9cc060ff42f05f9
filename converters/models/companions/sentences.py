"""What other libraries put beside a model: the modules of sentence-transformers, the head of SetFit."""

from converters.models.companions.companion import Companion
from converters.models.companions.folder import Folder
from converters.models.companions.names import SENTENCES, SETFIT

# without settings, so that its folder may be empty, and is then neither in Git nor on the Hub
_WITHOUT_FILES = ("Normalize",)
_TRANSFORMER = "Transformer"
_HEADS = ("model_head.pkl", "model_head.safetensors", "model_head.bin")


def choose_modules(base: Folder, adapter: Folder) -> tuple[dict[str, Companion], list[str]]:
    """The files of sentence-transformers, whole from one side, and notes."""
    for side in (adapter, base):
        if (modules := side.modules) is None or (side is adapter and not _is_whole(side)):
            continue
        if any(kind.endswith(f".{_TRANSFORMER}") and path for kind, path in modules):
            # its weights are in a folder of their own, and would be loaded instead of the merged ones
            return {}, [
                f"the {side.side}'s modules.json names a model in a folder of its own; the modules of "
                "sentence-transformers are left out, because they would load that model unmerged"
            ]
        files = dict(side.sets[SENTENCES])
        for _, path in modules:
            files |= side.files_in(path) if path else {}
        return {name: Companion(side.side, path) for name, path in files.items()}, []
    return {name: Companion(base.side, path) for name, path in base.sets[SENTENCES].items()}, []


def _is_whole(side: Folder) -> bool:
    return all(not path or side.files_in(path) or kind.endswith(_WITHOUT_FILES) for kind, path in side.modules or ())


def choose_head(base: Folder, adapter: Folder) -> tuple[dict[str, Companion], list[str]]:
    """The head of SetFit, whole from one side, and notes."""
    own = adapter.sets[SETFIT]
    side = adapter if any(name in own for name in _HEADS) else base
    chosen = {name: Companion(side.side, path) for name, path in side.sets[SETFIT].items()}
    notes = []
    if side is base and (head := next((name for name in _HEADS if name in chosen), None)):
        notes.append(
            f"{head} of the base was fitted to the embeddings of the base; fit it again to those of the merged model"
        )
    return chosen, notes
