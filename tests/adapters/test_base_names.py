"""The base by its name: spellings, copies and quantizations of it, revisions, and bases that lack a part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import Pair, edit_config, edit_json, save_adapter, tiny_llama

from converters import load_adapter, open_checkpoint, prepare_merge, record_base
from converters.adapters.adapter import Weighted
from converters.adapters.base_record import check_base
from converters.api import planning
from converters.api.options import Sources
from converters.errors import BaseMismatchError, OptionError, PeanutError, QuantizedBaseError

COMMIT, OTHER = "0" * 40, "1" * 40


def notes_on(pair: Pair, repo_id: str | None, force: bool = False, **config: object) -> list[str]:
    """What is said of an adapter with this config and the base under this name."""
    edit_config(pair.adapter, **config)
    base = replace(open_checkpoint(pair.base), repo_id=repo_id, revision=COMMIT if repo_id else None)
    return check_base(base, load_adapter(pair.adapter), force)


def test_a_quantized_twin_gets_a_note(pair: Pair) -> None:
    (note,) = notes_on(pair, "meta-llama/Llama-3.2-1B", base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit")
    assert "unsloth/Llama-3.2-1B-bnb-4bit (quantized, by its name, so θ was trained on rounded weights)" in note
    assert "two copies of one model; names and shapes are checked" in note


def test_the_advice_is_never_a_quantized_base(pair: Pair) -> None:
    with pytest.raises(BaseMismatchError) as refused:
        notes_on(pair, "org/other", base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit")
    assert "give the model that unsloth/Llama-3.2-1B-bnb-4bit was made from, not quantized" in str(refused.value)
    edit_json(pair.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(QuantizedBaseError, match="by its name it was made from unsloth/Llama-3.2-1B$"):
        open_checkpoint(pair.base, "unsloth/Llama-3.2-1B-bnb-4bit")


def test_a_twin_of_other_shapes_is_refused(pair: Pair, tmp_path: Path) -> None:
    edit_config(pair.adapter, base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit")
    tiny_llama(hidden_size=64, num_attention_heads=8).save_pretrained(tmp_path / "Llama-3.2-1B")
    with pytest.raises(BaseMismatchError, match=r"has shape \(64, 64\), θ was trained for out = 32"):
        prepare_merge(tmp_path / "Llama-3.2-1B", pair.adapter)


def test_a_recorded_fingerprint_decides(pair: Pair, tmp_path: Path) -> None:
    record_base(load_adapter(pair.adapter), open_checkpoint(pair.base))
    assert notes_on(pair, "org/other", base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit") == []
    tiny_llama(rms_norm_eps=1e-3).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="was recorded on a base with fingerprint"):
        notes_on(replace(pair, base=tmp_path / "other"), "org/a", base_model_name_or_path="org/a")


def test_a_base_that_was_a_folder_of_the_training(pair: Pair) -> None:
    (note,) = notes_on(pair, "org/a", base_model_name_or_path="/data/my-base")
    assert note == "the adapter was trained on '/data/my-base'; org/a is taken for the same weights"
    assert notes_on(pair, "org/a", base_model_name_or_path="/data/a") == []
    for name in ("/data/PiSSA-Llama-2-7b-r16", "./out/residual"):
        with pytest.raises(BaseMismatchError, match="by its name a base that lacks what the adapter began with"):
            notes_on(pair, "org/a", base_model_name_or_path=name)
        assert notes_on(pair, "org/a", force=True, base_model_name_or_path=name)[0].startswith("forced: ")


def test_a_folder_of_the_cache_is_its_repository(pair: Pair) -> None:
    cached = f"/root/.cache/huggingface/hub/models--org--a/snapshots/{COMMIT}"
    assert notes_on(pair, "org/a", base_model_name_or_path=cached) == []
    (note,) = notes_on(pair, "org/a", base_model_name_or_path=cached.replace(COMMIT, OTHER))
    assert note == f"the adapter was trained on revision {OTHER} of org/a, this is {COMMIT}"
    with pytest.raises(BaseMismatchError, match="was trained on org/a, the base is org/b"):
        notes_on(pair, "org/b", base_model_name_or_path=cached)


def test_a_base_in_the_cache_is_its_repository(pair: Pair) -> None:
    folder = pair.base.parent / "models--org--a" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    pair.base.rename(folder)
    here = replace(pair, base=folder)
    assert notes_on(here, None, base_model_name_or_path="org/a", revision=COMMIT) == []
    (note,) = notes_on(here, None, revision=OTHER)
    assert note == f"the adapter was trained on revision {OTHER} of org/a, this is {COMMIT}"
    with pytest.raises(BaseMismatchError, match="was trained on org/b, the base is org/a"):
        notes_on(here, None, base_model_name_or_path="org/b")


@pytest.mark.parametrize(
    ("recorded", "given"),
    [
        ("roberta-base", "FacebookAI/roberta-base"),
        ("FacebookAI/roberta-base", "roberta-base"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("org/A-Model", "org/a-model"),
        (f"/cache/models--org--a/snapshots/{OTHER}", "org/a"),
    ],
)
def test_a_recorded_revision_is_taken_whatever_the_spelling(
    pair: Pair, recorded: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(pair.adapter, base_model_name_or_path=recorded, revision=None if recorded[0] == "/" else OTHER)
    assert revision_for(given, pair.adapter, monkeypatch=monkeypatch) == OTHER
    assert revision_for("org/another", pair.adapter, monkeypatch=monkeypatch) is None


def test_two_revisions_of_one_base(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    second = pair.adapter.with_name("second")
    save_adapter(tiny_llama(), second)
    for adapter, revision in ((pair.adapter, COMMIT), (second, OTHER)):
        edit_config(adapter, base_model_name_or_path="org/a", revision=revision)
    with pytest.raises(OptionError, match=f"was trained on revision {COMMIT} of org/a, .*second on {OTHER}"):
        revision_for("org/a", pair.adapter, second, monkeypatch=monkeypatch)


def revision_for(base: str, *adapters: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The revision of a base that would be downloaded."""
    asked: list[str | None] = []

    def find(name: str, revision: str | None, *_: object) -> None:
        asked.append(revision)
        raise PeanutError("not downloaded")

    monkeypatch.setattr(planning, "find_base", find)
    try:
        planning.open_base(Sources(base, []), [Weighted(load_adapter(adapter)) for adapter in adapters])
    except OptionError:
        raise
    except PeanutError:
        pass
    return asked[0]
