"""The files that a checkpoint needs besides its weights: tokenizer, chat template, preprocessor, licence."""

from pathlib import Path

_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
)
_USE_PATTERNS = (
    "generation_config.json",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
)
_BASE_PATTERNS = (
    "*.py",  # modelling code that the config's auto_map names; copied, never run
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
COMPANION_PATTERNS = (*_TOKENIZER_PATTERNS, *_USE_PATTERNS, *_BASE_PATTERNS)

# a folder with one of these has a complete tokenizer, which must not be mixed with the base's files
_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json")


def find_companions(base: Path, adapter: Path | None) -> dict[str, Path]:
    """Relative name -> file to copy. The adapter's files take precedence: training may have added tokens.

    `adapter` is None for an adapter that is a single file, since the files next to it may be unrelated.

    If the adapter folder contains a tokenizer, none of the base's tokenizer files are copied.
    """
    own = _matching(adapter, (*_TOKENIZER_PATTERNS, *_USE_PATTERNS)) if adapter is not None else {}
    own_tokenizer = any(mark in own for mark in _TOKENIZER_MARKS)
    wanted = (*_USE_PATTERNS, *_BASE_PATTERNS) if own_tokenizer else COMPANION_PATTERNS
    return {**_matching(base, wanted), **own}


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
