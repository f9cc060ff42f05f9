"""Whether the tokenizer files of an adapter are a whole tokenizer."""

from collections.abc import Collection
from fnmatch import fnmatchcase

_CONFIG = "tokenizer_config.json"
# each of them alone is a vocabulary
_VOCABULARIES = (
    "tokenizer.json", "tekken.json", "vocab.txt", "dict.txt", "byte_maps.json", "*.model", "*.tiktoken",
    "*.tokenizer",
)  # fmt: skip
_BPE, _MERGES = "vocab.json", "merges.txt"


def is_whole(names: Collection[str], base: Collection[str]) -> bool:
    """Whether the adapter's tokenizer files `names` can be loaded without any of the base's.

    A tokenizer of bytes has no vocabulary: for it, the config is enough.
    """
    if _has_vocabulary(names, base):
        # of several vocabularies that a slow tokenizer reads together, all have to be there
        together = {name for name in base if name.endswith(".spm")}
        return "tokenizer.json" in names or together <= set(names)
    return _CONFIG in names and not _has_vocabulary(base, ())


def _has_vocabulary(names: Collection[str], base: Collection[str]) -> bool:
    if any(fnmatchcase(name, pattern) for name in names for pattern in _VOCABULARIES):
        return True
    if _BPE not in names:
        return False
    # a tokenizer of letters (CTC) or one beside sentencepiece models has a vocab.json without merges
    letters = _BPE in base and _MERGES not in base and "tokenizer.json" not in base
    return _MERGES in names or letters or not base or any(name.endswith(".spm") for name in names)
