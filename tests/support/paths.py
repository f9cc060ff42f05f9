"""Where the tests find real bases, adapters and data."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DATA = Path(__file__).parent.parent / "data"
SMOLLM2 = ROOT / "build" / "bases" / "smollm2-135m-instruct"
VIT_SMALL = ROOT / "build" / "bases" / "vit-small"
MINILM = ROOT / "build" / "bases" / "minilm"
JSON_ADAPTER = ROOT / "examples" / "adapters" / "smollm2-json"
