"""Names and versions: what a name stands for when files are replaced, broken, removed or added."""

import json
import shutil
from pathlib import Path

import pytest
from support.classify.stand_ins import exchange, stand_in, stand_in_tasks
from support.tiny_models import edit_json

from converters.errors import CheckpointError, OptionError
from peanut_serve.classify.serving import library as library_module
from peanut_serve.classify.serving.library import Library
from peanut_serve.errors import UnknownVariantError, VariantError


def test_a_task_alone_has_the_name_of_its_folder_and_others_their_own(tmp_path: Path) -> None:
    alone, several = stand_in(tmp_path / "mood"), stand_in_tasks(tmp_path / "tasks", ("pets", "cars"))
    library = Library([alone, several])
    assert library.names() == ["cars", "mood", "pets"]
    assert library.current("pets").task.labels == ("pets", "other")
    assert Library([tmp_path]).names() == ["cars", "mood", "pets"]


def test_a_version_is_the_same_object_until_its_files_change(tmp_path: Path) -> None:
    library = Library([stand_in(tmp_path / "mood")])
    first = library.current("mood")
    assert library.current("mood") is first
    edit_json(tmp_path / "mood" / "config.json", id2label={"0": "awful", "1": "great"})
    second = library.current("mood")
    assert second is not first
    assert second.task.labels == ("awful", "great")
    assert second.digest != first.digest


def test_what_was_found_is_known_without_reading_files(tmp_path: Path) -> None:
    library = Library([stand_in(tmp_path / "mood"), stand_in(tmp_path / "other")])
    first = library.current("mood")
    shutil.rmtree(tmp_path / "mood")
    assert library.found() == {"mood": first, "other": None}
    stand_in(tmp_path / "mood")
    library.reread("mood")
    assert library.found() == {"mood": None, "other": None}
    second = library.current("mood")
    assert second is not first
    assert second.digest == first.digest


def test_the_digest_depends_on_all_that_answers_depend_on(tmp_path: Path) -> None:
    def digest(name: str, **changes: object) -> str:
        folder = stand_in(tmp_path / name / "mood", **changes)
        return Library([folder]).current("mood").digest

    same = {digest("a"), digest("b")}
    assert len(same) == 1
    other_tokenizer = stand_in(tmp_path / "c" / "mood")
    (other_tokenizer / "tokenizer_config.json").write_text("{}")
    found = {
        *same,
        digest("d", labels=("bad", "better")),
        digest("e", graph=b"another graph"),
        Library([other_tokenizer]).current("mood").digest,
    }
    assert len(found) == 4
    readme = stand_in(tmp_path / "f" / "mood")
    (readme / "README.md").write_text("says nothing about answers")
    assert {Library([readme]).current("mood").digest} == same


def test_a_replaced_folder_is_the_next_version(tmp_path: Path) -> None:
    link = tmp_path / "mood"
    exchange(link, stand_in(tmp_path / "v1" / "x"))
    library = Library([link])
    first = library.current("mood")
    exchange(link, stand_in(tmp_path / "v2" / "x", labels=("no", "yes")))
    assert library.current("mood").task.labels == ("no", "yes")
    assert not first.is_current
    exchange(link, tmp_path / "v1" / "x")
    assert library.current("mood").digest == first.digest


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"peanut": ')


def forget_graph(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def forget_section(folder: Path) -> None:
    edit_json(folder / "config.json", peanut={"form": "merged"})


@pytest.mark.parametrize("damage", [damage_config, forget_graph, forget_section])
def test_a_broken_replacement_is_refused_until_it_is_mended(tmp_path: Path, damage) -> None:
    folder = stand_in(tmp_path / "mood")
    kept = shutil.copytree(folder, tmp_path / "kept")
    library = Library([folder])
    first = library.current("mood")
    damage(folder)
    for _ in range(2):
        with pytest.raises(VariantError, match=r"mood cannot be served: .*mood"):
            library.current("mood")
    shutil.rmtree(folder)
    kept.rename(folder)
    assert library.current("mood").digest == first.digest


def test_a_folder_that_is_gone_is_unknown(tmp_path: Path) -> None:
    library = Library([stand_in(tmp_path / "mood"), stand_in(tmp_path / "other")])
    library.current("mood")
    (tmp_path / "mood").rename(tmp_path / "away")
    with pytest.raises(UnknownVariantError, match="the files of mood were not found"):
        library.current("mood")
    assert library.names() == ["other"]
    assert library.is_known("mood")


def test_tasks_are_added_while_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_RESCAN", 0.0)
    stand_in(tmp_path / "mood")
    library = Library([tmp_path])
    with pytest.raises(UnknownVariantError, match="there is no task pets; the available tasks are mood"):
        library.current("pets")
    stand_in(tmp_path / "pets")
    assert library.current("pets").task.labels == ("bad", "good")
    assert library.names() == ["mood", "pets"]


def test_a_name_with_a_precision_is_that_graph(tmp_path: Path) -> None:
    folder = stand_in(tmp_path / "mood")
    library = Library([folder])
    with pytest.raises(VariantError, match="has mood:int8 in fp32, not in int8"):
        library.current("mood:int8")
    (folder / "int8.onnx").write_bytes(b"a smaller graph")
    config = json.loads((folder / "config.json").read_text())
    config["peanut"]["models"]["int8"] = "int8.onnx"
    edit_json(folder / "config.json", peanut=config["peanut"])
    assert library.current("mood:int8").digest != library.current("mood").digest
    for unknown in ("mood:int4", "mood:", ":int8"):
        with pytest.raises(UnknownVariantError):
            library.current(unknown)


@pytest.mark.parametrize("name", ["../mood", "/etc/passwd", "mood/config.json", "", "m" * 5000, "mood\x00", "\ud800"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    library = Library([stand_in(tmp_path / "mood")])
    with pytest.raises(UnknownVariantError) as error:
        library.current(name)
    assert len(str(error.value)) < 300


def test_what_cannot_be_served_at_all_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="contains no ONNX export"):
        Library([tmp_path / "empty"])
    stand_in(tmp_path / "a" / "mood"), stand_in(tmp_path / "b" / "mood")
    with pytest.raises(OptionError, match=r"a/mood and .*b/mood both have a task mood; rename one"):
        Library([tmp_path / "a" / "mood", tmp_path / "b" / "mood"])
    with pytest.raises(OptionError, match=r"the task 'a mood' cannot be served; its name must match"):
        Library([stand_in(tmp_path / "a mood")])
