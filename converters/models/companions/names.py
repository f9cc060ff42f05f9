"""Which file belongs to which set of companions."""

from fnmatch import fnmatchcase

TOKENIZER = "tokenizer"
TEMPLATE = "chat template"
PROCESSOR = "processor"
GENERATION = "generation config"
SENTENCES = "sentence-transformers modules"
SETFIT = "SetFit head"
BASE_ONLY = "code and licences"

# the first set with a matching pattern has the file
SETS: dict[str, tuple[str, ...]] = {
    TEMPLATE: ("chat_template*", "additional_chat_templates/*.jinja"),
    PROCESSOR: ("*processor_config.json",),
    GENERATION: ("generation_config.json",),
    SENTENCES: ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    SETFIT: ("config_setfit.json", "model_head.*"),
    TOKENIZER: (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "normalizer.json",
        "vocab*",
        "entity_vocab.json",
        "merges*.txt",
        "dict.txt",
        "emoji.json",
        "byte_maps.json",
        "tekken.json",
        "bpe.codes",
        "*.model",
        "*.spm",
        "*.tiktoken",
        "*.tokenizer",
    ),
    # modelling code that the config's auto_map names: copied, never run
    BASE_ONLY: ("*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
}
# folders of the modules that sentence-transformers applies after the model
MODULE_FOLDERS = "[1-9]*_*/*"
# what is downloaded of a base or an adapter on the Hub
COMPANION_PATTERNS = (*(pattern for patterns in SETS.values() for pattern in patterns), MODULE_FOLDERS)

_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.pkl",
)  # fmt: skip


def set_of(name: str) -> str | None:
    """The set that a file, relative to its folder, belongs to; None for a file that is no companion."""
    for kind, patterns in SETS.items():
        # fnmatch's * matches a slash as well: code in a folder is not code that an auto_map names
        if any(fnmatchcase(name, one) and name.count("/") == one.count("/") for one in patterns):
            return kind
    return None


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says where they are."""
    return any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)
