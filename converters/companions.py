"""The files beside the weights that make a checkpoint usable: tokenizer, chat template, preprocessor, licence."""

from pathlib import Path

COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "*.py",  # modelling code that the config's auto_map names; copied, never run
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

# a folder that holds one of these brings a whole tokenizer: the base's files would only mix with it
_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_PATTERNS = COMPANION_PATTERNS[1:8]


def find_companions(base: Path, adapter: Path) -> dict[str, Path]:
    """Relative name -> file to copy. The adapter's files win: training may have added tokens.

    If the adapter folder holds a tokenizer, none of the base's tokenizer files are taken.
    """
    found = _matching(base, COMPANION_PATTERNS)
    own = _matching(adapter, tuple(p for p in COMPANION_PATTERNS if p not in ("*.py", "LICENSE*", "NOTICE*")))
    if any(mark in own for mark in _TOKENIZER_MARKS):
        found = {name: path for name, path in found.items() if name not in _matching(base, _TOKENIZER_PATTERNS)}
    return {**found, **own}


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
