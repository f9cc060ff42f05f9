"""Image, audio and video processors: their own files, and what a processor_config.json states about them.

transformers 5 saves them nested in processor_config.json, and reads what is nested before their own files.
"""

from collections.abc import Mapping
from pathlib import Path

from converters.models.companions.companion import Companion
from converters.models.companions.folder import Folder, as_json
from converters.models.companions.names import PROCESSOR

_SHELL = "processor_config.json"
_IMAGES = "preprocessor_config.json"
_VIDEOS = "video_preprocessor_config.json"
# own file -> the settings in processor_config.json that are read before it
_NESTED = {_IMAGES: ("image_processor", "feature_extractor", "audio_processor"), _VIDEOS: ("video_processor",)}


def choose_processor(base: Folder, adapter: Folder) -> dict[str, Companion]:
    """The files of the processor: the adapter's if they are whole, the base's otherwise.

    An adapter often has the image processor's file alone. It is whole, and the base's processor_config.json, which
    names the class around it, stays without the settings that would be read before the adapter's.
    """
    own, others = adapter.sets[PROCESSOR], base.sets[PROCESSOR]
    if not own or not _is_whole(adapter, base):
        return _companions(base.side, others)
    chosen = _companions(adapter.side, own)
    if _SHELL in own:
        return chosen
    for name in others.keys() - own.keys():
        chosen[name] = Companion(base.side, others[name])
    if _SHELL in others:
        settings = base.read(_SHELL)
        hiding = [key for name in own for key in _NESTED.get(name, ()) if key in settings]
        if hiding:
            kept = {key: value for key, value in settings.items() if key not in hiding}
            chosen[_SHELL] = chosen[_SHELL].edited(as_json(kept), f"without {', '.join(hiding)}")
    return chosen


def _is_whole(adapter: Folder, base: Folder) -> bool:
    own, others = adapter.sets[PROCESSOR], base.sets[PROCESSOR]
    if _SHELL not in own:
        return True
    nested = [key for keys in _NESTED.values() for key in keys]
    needs_files = _IMAGES in others or any(key in base.read(_SHELL) for key in nested)
    return not needs_files or _IMAGES in own or any(key in adapter.read(_SHELL) for key in nested)


def _companions(side: str, files: Mapping[str, Path]) -> dict[str, Companion]:
    return {name: Companion(side, path) for name, path in files.items()}
