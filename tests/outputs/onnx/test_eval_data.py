"""Eval data on the disk, and what does not fit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.preprocessor_folders import IMAGES, LABELS, TEXTS, refusal, save_picture, write

from converters.errors import OptionError
from converters.inference.kinds import INPUTS, ModelKind
from converters.outputs.onnx.eval_data import EvalData, read_eval_data


def read_csv(folder: Path, text: str, labels: Sequence[str] = LABELS, encoding: str = "utf-8") -> EvalData:
    return read_eval_data(write(folder / "data.csv", text, encoding), TEXTS, labels)


def test_a_folder_of_images_by_class(tmp_path: Path):
    data = tmp_path / "pets"
    for name in ("dog/b.PNG", "dog/a.jpg", "2/a.webp", "cat/z.jpeg", "cat/y.bmp"):  # 2 is the horse
        save_picture(data / name)
    for name in ("dog/.hidden.png", "dog/notes.txt", ".git/a.png", "README.md"):
        (data / name).parent.mkdir(exist_ok=True)
        write(data / name, "")
    found = read_eval_data(data, IMAGES, [*LABELS, "sheep"])
    assert found.name == "pets"
    wanted = [("2/a.webp", 2), ("cat/y.bmp", 0), ("cat/z.jpeg", 0), ("dog/a.jpg", 1), ("dog/b.PNG", 1)]
    assert [(str(p.relative_to(data)), t) for p, t in zip(found.examples, found.targets, strict=True)] == wanted
    assert found.targets.dtype == np.int64


def test_a_name_that_is_a_number_counts_before_an_index(tmp_path: Path):
    save_picture(tmp_path / "1" / "a.png")
    assert read_eval_data(tmp_path, IMAGES, ["1", "0"]).targets.tolist() == [0]
    assert read_csv(tmp_path, "text,label\na,1\nb,0\n", ["1", "0"]).targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("header", "cells", "wanted"),
    [
        ("text,label", "{0},{2}", "{0}"),
        ("id,label,sentence", "7,{2},{0}", "{0}"),
        ("text,text_pair,label", "{0},{1},{2}", ("{0}", "{1}")),
        ("text_pair,sentence,label", "{1},{0},{2}", ("{0}", "{1}")),
        ("sentence2,sentence1,label", "{1},{0},{2}", ("{0}", "{1}")),
    ],
)
def test_a_csv_of_texts(tmp_path: Path, header: str, cells: str, wanted: str | tuple[str, str]):
    rows = (("good", "x", "dog"), ("bäd", "y", "2"), ('"a\n""b"", c"', "z", "cat"))
    found = read_csv(tmp_path, "\n".join([header, "", *(cells.format(*row) for row in rows), ""]))
    plain = (("good", "x"), ("bäd", "y"), ('a\n"b", c', "z"))
    assert found.name == "data.csv"
    assert found.examples == tuple(
        wanted.format(*row) if isinstance(wanted, str) else tuple(one.format(*row) for one in wanted) for row in plain
    )
    assert found.targets.tolist() == [1, 2, 0]
    assert found.targets.dtype == np.int64


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path):
    found = read_csv(tmp_path, 'text,label\r\na,cat\r\n"b\r\nc",dog\r\n', encoding="utf-8-sig")
    assert found.examples == ("a", "b\r\nc")


def test_with_one_label_values_are_read(tmp_path: Path):
    found = read_csv(tmp_path, "sentence1,sentence2,label\na,b,2.5\nc,d,-1e-1\ne,f,3\n", ["LABEL_0"])
    assert found.targets.tolist() == [2.5, -0.1, 3.0]
    assert found.targets.dtype == np.float64


COLUMNS = (
    "expected 'label' and one of 'text' (perhaps with 'text_pair'), 'sentence' (perhaps with 'text_pair'), or "
    "'sentence1' with 'sentence2', each once"
)


CHOICES = "expected one of 'cat', 'dog', 'horse', or an index below 3"


@pytest.mark.parametrize(
    ("text", "labels", "wanted"),
    [
        ("", LABELS, f" is empty, {COLUMNS}"),
        ("text,label\n", LABELS, ": no rows under its header, expected an example in each"),
        ("body,label\na,cat\n", LABELS, f": its columns are 'body', 'label'; {COLUMNS}"),
        ("text\tlabel\na\tcat\n", LABELS, f": its columns are 'text\\tlabel'; {COLUMNS}"),
        ("text,class\na,cat\n", LABELS, f": its columns are 'text', 'class'; {COLUMNS}"),
        ("sentence1,label\na,cat\n", LABELS, f": its columns are 'sentence1', 'label'; {COLUMNS}"),
        ("text,sentence,label\na,b,cat\n", LABELS, f": its columns are 'text', 'sentence', 'label'; {COLUMNS}"),
        ("text,text,label\na,b,cat\n", LABELS, f": its columns are 'text', 'text', 'label'; {COLUMNS}"),
        ("text,label,label\na,1,2\n", LABELS, f": its columns are 'text', 'label', 'label'; {COLUMNS}"),
        ('text,label\n"a\nb",cat\nc,cow\n', LABELS, f", line 4: the label is 'cow', {CHOICES}"),
        ("text,label\na,Cat\n", LABELS, f", line 2: the label is 'Cat', {CHOICES}"),
        ("text,label\na,\n", LABELS, f", line 2: the label is '', {CHOICES}"),
        ("text,label\na,3\n", LABELS, f", line 2: the label is '3', {CHOICES}"),
        ("text,label\na,-1\n", LABELS, f", line 2: the label is '-1', {CHOICES}"),
        ("text,label\na,1.0\n", LABELS, f", line 2: the label is '1.0', {CHOICES}"),
        ("text,label\na,٢\n", LABELS, f", line 2: the label is '٢', {CHOICES}"),
        (f"text,label\na,{'9' * 5000}\n", LABELS, f", line 2: the label is '{'9' * 40}', {CHOICES}"),
        (
            "text,label\na,cow\n",
            [f"label {i}" for i in range(40)],
            ", line 2: the label is 'cow', expected one of 'label 0', 'label 1', 'label 2', 'label 3', 'label 4', "
            "'label 5', ..., or an index below 40",
        ),
        *(
            (
                f"text,label\na,1\nb,{value}\n",
                ["LABEL_0"],
                f", line 3: the label is '{value}', expected a finite number: the model predicts a value",
            )
            for value in ("high", "nan", "inf", "")
        ),
        *(
            (
                f"text,label\na,cat\n\n{row}\n",
                LABELS,
                f", line 4: {count} fields, expected 2 as in the header; a field with a comma or a quote in it has "
                "to be quoted",
            )
            for row, count in (("b", 1), ("b,c,cat", 3))
        ),
        (
            'text,label\na,cat\n"b,cat\nc,dog\n',
            LABELS,
            ", line 3: not CSV (unexpected end of data), expected fields with commas between them",
        ),
        ("text,label\na,cat\n", (), ": the model's config.json names no labels, expected an id2label from '0' on"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, labels: Sequence[str], wanted: str):
    with pytest.raises(OptionError) as error:
        read_csv(tmp_path, text, labels)
    assert refusal(error) == f"{tmp_path / 'data.csv'}{wanted}"


def test_a_file_that_is_no_csv_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match=r"data\.csv: not UTF-8 .*, expected a CSV file in UTF-8") as error:
        read_csv(tmp_path, "text,label\nbäd,cat\n", encoding="latin-1")
    refusal(error)
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path, TEXTS, LABELS)
    assert refusal(error) == f"{tmp_path}: cannot be read (Is a directory), expected a CSV file"
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path / "none.csv", TEXTS, LABELS)
    assert (
        refusal(error) == f"{tmp_path / 'none.csv'}: cannot be read (No such file or directory), expected a CSV file"
    )


@pytest.mark.parametrize(
    ("files", "labels", "wanted"),
    [
        (["cow/a.png"], LABELS, f"/pets/cow: no label has this name, {CHOICES}"),
        (["3/a.png"], LABELS, f"/pets/3: no label has this name, {CHOICES}"),
        (["a.png"], LABELS, "/pets: no class folders in it, expected pets/LABEL/FILE"),
        (["cat/a.png"], ["LABEL_0"], "/pets: folders name classes, but the model predicts a single value, 'LABEL_0'"),
        (["cat/a.png"], (), "/pets: the model's config.json names no labels, expected an id2label from '0' on"),
        (
            ["cat/a.png", "dog/deeper/a.png"],
            LABELS,
            "/pets/dog: no examples in it, expected files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, "
            ".tif, .tiff, .webp",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, files: list[str], labels: Sequence[str], wanted: str):
    for name in files:
        save_picture(tmp_path / "pets" / name)
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path / "pets", IMAGES, labels)
    assert refusal(error) == f"{tmp_path}{wanted}"


def test_what_is_no_folder_is_refused(tmp_path: Path):
    file = write(tmp_path / "data.csv", "text,label\n")
    for path, found in ((file, "is a file"), (tmp_path / "none", "does not exist")):
        with pytest.raises(OptionError) as error:
            read_eval_data(path, IMAGES, LABELS)
        assert refusal(error) == f"{path} {found}, expected a folder with a folder of files for each class"


@pytest.mark.parametrize("task", ["token-classification", "text-generation", "feature-extraction"])
def test_other_kinds_are_refused(tmp_path: Path, task: str):
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path, ModelKind(task, INPUTS["bert"], ("logits",)), LABELS)
    assert refusal(error) == f"eval data is for classifiers of images, sounds and texts, not for {task}"
