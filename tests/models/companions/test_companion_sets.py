"""Companions are sets: each comes whole from one side, and what is left out is named."""

import json
from pathlib import Path

import pytest

from converters.errors import AdapterError, CheckpointError
from converters.models.companions.choice import adapter_companions, choose_companions
from converters.models.companions.companion import Companions


def folders(tmp_path: Path, base: dict[str, str], adapter: dict[str, str]) -> tuple[Path, Path]:
    for side, files in (("base", base), ("adapter", adapter)):
        for name, text in files.items():
            path = tmp_path / side / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / side).mkdir(parents=True, exist_ok=True)
    return tmp_path / "base", tmp_path / "adapter"


def choose(tmp_path: Path, base: dict[str, str], adapter: dict[str, str]) -> Companions:
    return choose_companions(*folders(tmp_path, base, adapter), {"config.json", "model.safetensors", "README.md"})


def sides(companions: Companions) -> dict[str, str]:
    return {name: one.side for name, one in companions.files.items()}


SLOW = {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "{}"}
FAST = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}


@pytest.mark.parametrize(
    ("base", "adapter", "winner"),
    [
        (FAST, {"tokenizer.json": '{"new": 1}'}, "adapter"),
        (FAST, {"tokenizer.json": "{}"}, "base"),  # it is the base's, and the rest of the base's belongs to it
        (FAST, {"tokenizer_config.json": '{"new": 1}', "special_tokens_map.json": "{}"}, "base"),
        (FAST, {"added_tokens.json": '{"new": 1}'}, "base"),
        (SLOW, {"vocab.json": '{"new": 1}'}, "base"),
        (SLOW, {"vocab.json": '{"new": 1}', "merges.txt": ""}, "adapter"),
        ({"vocab.json": "{}", "tokenizer_config.json": "{}"}, {"vocab.json": '{"new": 1}'}, "adapter"),  # CTC
        (FAST | {"tokenizer.model": ""}, {"tokenizer.model": "new"}, "adapter"),
        ({"tokenizer_config.json": "{}"}, {"tokenizer_config.json": '{"new": 1}'}, "adapter"),  # of bytes
        ({}, {"special_tokens_map.json": "{}"}, "adapter"),
    ],
)
def test_a_tokenizer_comes_whole_from_one_side(
    tmp_path: Path, base: dict[str, str], adapter: dict[str, str], winner: str
) -> None:
    found = choose(tmp_path, base, adapter)
    assert sides(found) == dict.fromkeys(adapter if winner == "adapter" else base, winner)
    lost = {(one.side, one.name) for one in found.left_out}
    if winner == "adapter":
        assert lost == {("base", name) for name in base.keys() - adapter.keys()}
    elif adapter != {"tokenizer.json": "{}"}:
        assert lost == {("adapter", name) for name in adapter}
        assert all("a tokenizer without its vocabulary" in note for note in found.notes)
        assert len(found.notes) == len(adapter)


def test_every_file_of_the_base_is_carried_replaced_or_named(tmp_path: Path) -> None:
    base = dict.fromkeys(
        (
            "config.json", "model.safetensors", "README.md", "tokenizer.json", "vocab.txt", "generation_config.json",
            "LICENSE.md", "modeling_x.py", "pytorch_model.bin", "onnx/model.onnx", "photo.png", ".gitattributes",
        ),
        "{}",
    )  # fmt: skip
    found = choose(tmp_path, base, {"tokenizer.json": "[]", "generation_config.json": "[]", "train.py": "", "x": ""})
    assert sides(found) == {
        "tokenizer.json": "adapter",
        "generation_config.json": "adapter",
        "LICENSE.md": "base",
        "modeling_x.py": "base",
    }
    facts = found.facts()
    assert facts["left_out"] == {
        "vocab.txt": {"from": "base", "why": "the adapter brings its own tokenizer"},
        "pytorch_model.bin": {"from": "base", "why": "weights without the adapter"},
        "onnx/": {"from": "base", "why": "not a file that a loaded model needs"},
        "photo.png": {"from": "base", "why": "not a file that a loaded model needs"},
        ".gitattributes": {"from": "base", "why": "not a file that a loaded model needs"},
    }
    assert facts["files"]["tokenizer.json"]["from"] == "adapter"


POOLED = {
    "modules.json": json.dumps(
        [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ),
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "config_sentence_transformers.json": '{"prompts": {"query": "q: "}}',
    "sentence_bert_config.json": '{"max_seq_length": 64}',
}


@pytest.mark.parametrize(
    ("adapter", "winner"),
    [
        ({}, "base"),
        (POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}, "adapter"),
        ({"modules.json": POOLED["modules.json"]}, "base"),  # its pooling is missing
        ({"config_sentence_transformers.json": "{}"}, "base"),
    ],
)
def test_modules_of_sentence_transformers_come_whole(tmp_path: Path, adapter: dict[str, str], winner: str) -> None:
    found = choose(tmp_path, POOLED, adapter)
    assert sides(found) == dict.fromkeys(POOLED, winner)
    found.write(tmp_path / "out")
    wanted = {**POOLED, **(adapter if winner == "adapter" else {})}
    assert {name: (tmp_path / "out" / name).read_text() for name in POOLED} == wanted


def test_modules_that_would_load_the_unmerged_model_are_left_out(tmp_path: Path) -> None:
    modules = json.dumps([{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}])
    found = choose(tmp_path, {"modules.json": modules, "0_Transformer/model.safetensors": ""}, {})
    assert found.files == {}
    assert [one.name for one in found.left_out] == ["0_Transformer/", "modules.json"]
    assert "would load that model unmerged" in found.notes[0]


def test_module_folders_stay_in_the_model(tmp_path: Path) -> None:
    """A path in modules.json comes from whoever made the model."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    modules = json.dumps([{"path": "../secret", "type": "x.Pooling"}, {"path": "..", "type": "x.Pooling"}])
    assert set(choose(tmp_path, {"modules.json": modules}, {}).files) == {"modules.json"}


def test_a_head_of_setfit_is_carried_with_a_note(tmp_path: Path) -> None:
    head = {"model_head.pkl": "x", "config_setfit.json": "{}"}
    found = choose(tmp_path, head, {})
    assert sides(found) == dict.fromkeys(head, "base")
    assert "was fitted to the embeddings of the base" in found.notes[0]
    assert sides(choose(tmp_path / "2", head, {"model_head.pkl": "y"})) == {"model_head.pkl": "adapter"}


def test_what_is_no_file_yet_is_refused(tmp_path: Path) -> None:
    pointer = {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a Git LFS pointer, .* 'git lfs pull'"):
        choose(tmp_path / "1", pointer, {})
    with pytest.raises(AdapterError, match="Git LFS pointer"):
        choose(tmp_path / "2", {}, pointer)


def test_an_adapter_in_another_format_keeps_all_of_its_files(tmp_path: Path) -> None:
    _, adapter = folders(tmp_path, {}, {**POOLED, "added_tokens.json": "{}", "train.py": "", "adapter_model.bin": ""})
    assert sides(adapter_companions(adapter)) == dict.fromkeys([*POOLED, "added_tokens.json"], "adapter")
    assert adapter_companions(None).files == {}
