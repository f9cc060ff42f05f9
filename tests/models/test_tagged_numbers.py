"""Numbers that JSON does not have, as transformers writes them into a config."""

import json
import math
from pathlib import Path

import transformers as tf
from support.sweep.small_configs import small_config

from converters.models.architecture import build_architecture
from converters.models.config import untagged


def test_a_config_with_infinity_is_built(tmp_path: Path) -> None:
    small_config("nemotron_h").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"__float__": "Infinity"} in config["time_step_limit"]
    assert build_architecture(config, "NemotronHForCausalLM").vocab_size == 128


def test_tags_are_read_as_transformers_reads_them() -> None:
    tag = "__float__"
    given = {"a": [{tag: "Infinity"}, {"b": {tag: "-Infinity"}}], "c": {tag: "NaN"}, "d": {tag: "x"}, "e": 1}
    given["f"] = {tag: "NaN", "g": None}
    found, wanted = untagged(given), tf.PreTrainedConfig._decode_special_floats(given)
    assert math.isnan(found.pop("c")) and math.isnan(wanted.pop("c"))
    assert found == wanted
    assert found["a"][0] == math.inf
