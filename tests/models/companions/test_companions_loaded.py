"""Companions as their users load them: tokenizer, chat template, image processor."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.companions.tiny_tokenizers import WORDS, said, said_by_processor, tiny_processor, tiny_tokenizer
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from converters.files.hashing import hash_file
from converters.models.companions.choice import choose_companions

BASE, TRAINED = "BASE {{ messages[0]['content'] }}", "TRAINED {{ messages[0]['content'] }}"


@pytest.fixture(name="sides")
def _sides(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "base", tmp_path / "adapter"


def carried(sides: tuple[Path, Path]) -> Path:
    """The folder of an output, without its weights."""
    folder = sides[0].parent / "out"
    choose_companions(*sides).write(folder)
    return folder


def test_a_template_in_the_adapters_config_is_not_hidden(sides: tuple[Path, Path]) -> None:
    base, adapter = sides
    tiny_tokenizer({"default": BASE, "tool_use": BASE}).save_pretrained(base)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": BASE}))
    tiny_tokenizer(TRAINED).save_pretrained(adapter, save_jinja_files=False)
    assert (base / "additional_chat_templates" / "tool_use.jinja").is_file()
    out = carried(sides)
    assert said(out) == "TRAINED hi"
    assert not (out / "additional_chat_templates").exists()
    assert not (out / "chat_template.json").exists()


@pytest.mark.parametrize("as_jinja", [True, False])
def test_several_templates_of_the_adapter(sides: tuple[Path, Path], as_jinja: bool) -> None:
    base, adapter = sides
    tiny_tokenizer(BASE).save_pretrained(base)
    tiny_tokenizer({"default": TRAINED, "short": "S"}).save_pretrained(adapter, save_jinja_files=as_jinja)
    out = carried(sides)
    assert (said(out), said(out, chat_template="short")) == ("TRAINED hi", "S")


@pytest.mark.parametrize("base_as_jinja", [True, False])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_a_template_without_a_whole_tokenizer(sides: tuple[Path, Path], file: str, base_as_jinja: bool) -> None:
    base, adapter = sides
    tiny_tokenizer(BASE, pad_token="<pad>").save_pretrained(base, save_jinja_files=base_as_jinja)
    adapter.mkdir()
    (adapter / file).write_text(TRAINED if file.endswith("jinja") else json.dumps({"chat_template": TRAINED}))
    out = carried(sides)
    assert said(out) == "TRAINED hi"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (len(tokenizer), tokenizer.pad_token) == (len(WORDS), "<pad>")


@pytest.mark.parametrize("as_jinja", [True, False])
def test_the_bases_template_stays_where_the_adapter_has_none(sides: tuple[Path, Path], as_jinja: bool) -> None:
    base, adapter = sides
    tiny_tokenizer(BASE).save_pretrained(base, save_jinja_files=as_jinja)
    tiny_tokenizer(words=(*WORDS, "new")).save_pretrained(adapter)
    out = carried(sides)
    assert said(out) == "BASE hi"
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("new") == len(WORDS)


@pytest.mark.parametrize("file", ["added_tokens.json", "special_tokens_map.json", "vocab.json"])
def test_one_file_of_a_tokenizer_leaves_a_vocabulary(sides: tuple[Path, Path], file: str) -> None:
    base, adapter = sides
    tiny_tokenizer().save_pretrained(base)
    adapter.mkdir()
    (adapter / file).write_text('{"other": 9}')
    assert AutoTokenizer.from_pretrained(carried(sides))("hello world")["input_ids"] == [3, 4]


def write_preprocessor(folder: Path, size: int) -> None:
    settings: dict[str, Any] = tiny_processor(size).image_processor.to_dict()
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def sizes(folder: Path) -> tuple[int, int]:
    """Of the image processor alone, and inside the processor."""
    alone, inside = AutoImageProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder).image_processor
    return alone.size["height"], inside.size["height"]


def test_nested_settings_of_the_base_do_not_hide_the_adapters_processor(sides: tuple[Path, Path]) -> None:
    base, adapter = sides
    tiny_processor(8, BASE).save_pretrained(base)
    assert "image_processor" in json.loads((base / "processor_config.json").read_text())
    write_preprocessor(adapter, 16)
    out = carried(sides)
    assert sizes(out) == (16, 16)
    assert AutoProcessor.from_pretrained(out).patch_size == 4
    assert (said(out), said_by_processor(out)) == ("BASE hi", "BASE hi")


def test_a_whole_processor_of_the_adapter(sides: tuple[Path, Path]) -> None:
    base, adapter = sides
    tiny_processor(8, BASE).save_pretrained(base)
    write_preprocessor(base, 12)
    tiny_processor(16, TRAINED).save_pretrained(adapter)
    out = carried(sides)
    assert sizes(out) == (16, 16)
    assert not (out / "preprocessor_config.json").exists()
    assert (said(out), said_by_processor(out)) == ("TRAINED hi", "TRAINED hi")


def test_a_processor_reads_the_template_of_the_adapters_tokenizer(sides: tuple[Path, Path]) -> None:
    """The base's stands where processors look first."""
    base, adapter = sides
    tiny_processor(8, BASE).save_pretrained(base)
    settings = json.loads((base / "processor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps({**settings, "chat_template": BASE}))
    tiny_tokenizer(TRAINED).save_pretrained(adapter, save_jinja_files=False)
    out = carried(sides)
    assert (said(out), said_by_processor(out)) == ("TRAINED hi", "TRAINED hi")
    assert sizes(out) == (8, 8)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_transformers_cannot_read_are_encoded_anew(sides: tuple[Path, Path], encoding: str) -> None:
    """As an editor on Windows saves them."""
    base, adapter = sides
    tiny_tokenizer(pad_token="<pad>", bos_token="é").save_pretrained(base)
    for file in base.glob("*.json"):
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    adapter.mkdir()
    with pytest.raises(ValueError, match="BOM|utf-8"):
        AutoTokenizer.from_pretrained(base)
    out = carried(sides)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer("hello world").input_ids) == ("<pad>", "é", [3, 4])
    facts = choose_companions(*sides).facts()["files"]["tokenizer.json"]
    assert facts["changed"] == f"encoded in UTF-8 instead of {encoding}"
    assert facts["xxh3_128"] == hash_file(out / "tokenizer.json")
