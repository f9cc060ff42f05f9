"""Eval data, from files to scores: images against Pillow and numpy, texts against ids worked out by hand."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BitImageProcessorPil, PreTrainedTokenizerFast, ViTImageProcessorPil

from converters.errors import CheckpointError, MissingDependencyError, OptionError, PeanutError, VerificationError
from converters.onnx_export.eval_data import EvalData, Score, agreement, batches, measure, read_eval_data, score_of
from converters.onnx_export.kinds import INPUTS, Kind
from converters.onnx_export.preprocessing import ImagePreprocessor, TextPreprocessor, image_shape, open_preprocessor

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
SETTINGS = {"size": {"height": 6, "width": 8}, "image_mean": MEAN, "image_std": STD}
IMAGES = Kind("image-classification", INPUTS["vit"], "logits")
TEXTS = Kind("text-classification", INPUTS["bert"], "logits")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "<end>")
PAD, UNK, CLS, SEP, GOOD, BAD, FILM, END = range(8)
LABELS = ("cat", "dog", "horse")


def picture(width: int = 11, height: int = 7, seed: int = 0, bands: int = 3) -> Image.Image:
    """Noise, so that a pixel out of its place is seen."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(noise if bands > 1 else noise[..., 0])


def save_picture(file: Path, image: Image.Image | None = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(file, **options)
    return file


def normalised(pixels: np.ndarray) -> np.ndarray:
    """(height, width, channels) as the graph wants them, by the plain formula."""
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


def image_model(folder: Path, **settings: Any) -> Path:
    ViTImageProcessorPil(**{**SETTINGS, **settings}).save_pretrained(folder)
    return folder


def text_model(
    folder: Path, template: bool = True, pad: str | None = "[PAD]", eos: str | None = None, **options: Any
) -> Path:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    if template:
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos, **options).save_pretrained(folder)
    return folder


def texts_of(model_type: str, folder: Path, **settings: Any) -> TextPreprocessor:
    kind = Kind("text-classification", INPUTS[model_type], "logits")
    found = open_preprocessor(folder, kind, {"model_type": model_type, "vocab_size": len(WORDS), **settings})
    assert isinstance(found, TextPreprocessor)
    return found


def write(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def refusal(error: pytest.ExceptionInfo[PeanutError]) -> str:
    """The message, of which there is one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


# images


def test_images_are_resized_rescaled_and_normalised_in_order(tmp_path: Path):
    model = image_model(tmp_path / "model")
    images = [picture(11, 7, seed=1), picture(5, 30, seed=2)]
    files = [save_picture(tmp_path / f"{i}.png", image) for i, image in enumerate(images)]
    found = open_preprocessor(model, IMAGES, VIT)(files)
    wanted = [normalised(np.asarray(image.resize((8, 6), Image.Resampling.BILINEAR))) for image in images]
    assert list(found) == ["pixel_values"]
    assert found["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(found["pixel_values"], np.array(wanted), rtol=0, atol=1e-5)


def test_the_middle_is_cut_out_where_the_processor_says_so(tmp_path: Path):
    crop = {"crop_size": {"height": 6, "width": 4}, "image_mean": MEAN, "image_std": STD}
    BitImageProcessorPil(size={"shortest_edge": 8}, resample=3, **crop).save_pretrained(tmp_path)
    image = picture(16, 32)
    preprocess = ImagePreprocessor(tmp_path, VIT)
    found = preprocess([save_picture(tmp_path / "a.png", image)])["pixel_values"]
    resized = np.asarray(image.resize((8, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(found, [normalised(resized[5:11, 2:6])], rtol=0, atol=1e-5)
    assert preprocess.shape == (3, 6, 4)


def test_without_rescaling_pixels_stay_as_they_are_but_for_the_dtype(tmp_path: Path):
    model = image_model(tmp_path / "model", do_rescale=False, do_normalize=False)
    found = ImagePreprocessor(model, VIT)([save_picture(tmp_path / "a.png", picture(8, 6))])["pixel_values"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], np.asarray(picture(8, 6)).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_are_converted_to_rgb(tmp_path: Path, mode: str):
    image = picture(8, 6).convert(mode)
    file = save_picture(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), image)
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([file])["pixel_values"]
    np.testing.assert_allclose(found, [normalised(np.asarray(image.convert("RGB")))], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (3, 3), (30, 1), (1, 30)])
def test_a_model_of_one_channel_gets_grey_images(tmp_path: Path, size: tuple[int, int], caplog):
    model = image_model(tmp_path / "model", image_mean=[0.5], image_std=[0.25])
    file = save_picture(tmp_path / "a.png", picture(*size))
    found = ImagePreprocessor(model, {**VIT, "num_channels": 1})([file])["pixel_values"]
    grey = np.asarray(picture(*size).convert("L").resize((8, 6), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found, [[(grey / 255 - 0.5) / 0.25]], rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("size", [(9, 3), (3, 3), (3, 1)])
def test_rows_are_not_taken_for_channels(tmp_path: Path, size: tuple[int, int]):
    file = save_picture(tmp_path / "a.png", picture(*size))
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([file])["pixel_values"]
    wanted = normalised(np.asarray(picture(*size).resize((8, 6), Image.Resampling.BILINEAR)))
    np.testing.assert_allclose(found, [wanted], rtol=0, atol=1e-5)


def test_images_are_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn by 90 degrees clockwise
    turned = save_picture(tmp_path / "a.png", picture(6, 8), exif=exif)
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([turned])["pixel_values"]
    np.testing.assert_allclose(found, [normalised(np.rot90(np.asarray(picture(6, 8)), k=-1))], rtol=0, atol=1e-5)


def spoil(file: Path, how: str) -> None:
    if how == "missing":
        return
    if how == "16 bits":
        Image.fromarray(np.full((6, 8), 40000, np.uint16)).save(file)
    elif how == "cut short":
        save_picture(file, picture(64, 64))
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "postscript":
        picture().save(file, format="EPS")
    else:
        file.write_bytes({"empty": b"", "text": b"a cat\n"}[how])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "No such file or directory"),
        ("empty", "cannot identify image file"),
        ("text", "cannot identify image file"),
        ("postscript", "cannot identify image file"),
        ("cut short", "truncated"),
        ("16 bits", "mode I;16, wanted 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, how: str, reason: str):
    preprocess = ImagePreprocessor(image_model(tmp_path / "model"), VIT)
    spoil(tmp_path / "a.png", how)
    with pytest.raises(OptionError, match=reason) as error:
        preprocess([save_picture(tmp_path / "fine.png"), tmp_path / "a.png"])
    message = refusal(error)
    assert message.startswith(f"{tmp_path / 'a.png'}: cannot be read as an image (")
    assert message.endswith("wanted a file of the format BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP")


@pytest.mark.parametrize("side", [12, 20])  # where Pillow warns, and where it raises
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int, monkeypatch):
    preprocess = ImagePreprocessor(image_model(tmp_path / "model"), VIT)
    bomb, fine = (
        save_picture(tmp_path / "a.png", picture(side, side)),
        save_picture(tmp_path / "b.png", picture(9, 9)),
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    preprocess([fine])
    with pytest.raises(OptionError, match=r"a\.png.*decompression bomb") as error:
        preprocess([bomb])
    refusal(error)


def test_files_and_texts_are_told_apart(tmp_path: Path):
    with pytest.raises(OptionError) as error:
        ImagePreprocessor(image_model(tmp_path / "images"), VIT)(["a good film"])
    assert refusal(error) == "'a good film' is a text, wanted an image file: the model takes images"
    with pytest.raises(OptionError) as error:
        texts_of("bert", text_model(tmp_path / "texts"))([Path("a.png")])
    assert refusal(error) == "a.png is a file, wanted a text: the model takes texts"


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"do_resize": False}, {}, r"different sizes \(\(3, 48, 64\), \(3, 64, 48\)\), wanted one that resizes"),
        ({"image_mean": [0.5]}, {}, "cannot be used .*mean must have 3 elements"),
        ({"size": "x"}, {}, "cannot be used .*size"),
        ({"image_processor_type": "NoSuch"}, {}, "cannot be used .*Unrecognized image processor"),
        ({}, {"num_channels": 1}, "cannot be used .*mean must have 1 elements"),
        ({}, {"num_channels": 4}, "takes images of 4 channels, wanted 1 or 3"),
        ({}, {"num_channels": "x"}, r"config\.json cannot be used .*num_channels"),
    ],
)
def test_an_unusable_image_processor_is_refused(tmp_path: Path, settings: dict, config: dict, reason: str):
    file = image_model(tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=reason) as error:
        open_preprocessor(tmp_path, IMAGES, {**VIT, **config})
    assert refusal(error).startswith(str(tmp_path))


def test_a_missing_or_broken_image_processor_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        open_preprocessor(tmp_path, IMAGES, VIT)
    assert refusal(error).startswith(f"{tmp_path}: no preprocessor_config.json; wanted the one the model was trained")
    write(tmp_path / "preprocessor_config.json", "{")
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: cannot be used .*not a valid JSON"
    ) as error:
        open_preprocessor(tmp_path, IMAGES, VIT)
    refusal(error)


def test_code_in_the_folder_is_not_run(tmp_path: Path):
    write(tmp_path / "code.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for task, name in (
        ("AutoImageProcessor", "preprocessor_config.json"),
        ("AutoTokenizer", "tokenizer_config.json"),
    ):
        names = "code.Own" if task == "AutoImageProcessor" else ["code.Own", "code.Own"]
        write(tmp_path / name, json.dumps({"auto_map": {task: names}}))
    write(tmp_path / "vocab.txt", "")
    for kind, config in ((IMAGES, VIT), (TEXTS, {"model_type": "bert"})):
        with pytest.raises(CheckpointError, match="custom code|trust_remote_code"):
            open_preprocessor(tmp_path, kind, config)
    assert not (tmp_path / "ran").exists()


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError) as error:
        open_preprocessor(image_model(tmp_path), IMAGES, VIT)
    assert refusal(error) == "Pillow is not installed: pip install 'peanut-serve[onnx]'"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"image_size": 32}, (3, 32, 32)),
        ({"image_size": [32, 48]}, (3, 32, 48)),
        ({"image_size": 28, "num_channels": 1}, (1, 28, 28)),
        ({}, (3, 224, 224)),  # ViT's own
    ],
)
def test_without_a_processor_the_config_says_the_shape(tmp_path: Path, config: dict, wanted: tuple):
    assert image_shape(tmp_path, {**VIT, **config}) == wanted


def test_the_processor_says_the_shape_before_the_config(tmp_path: Path):
    assert image_shape(image_model(tmp_path), {**VIT, "image_size": 32}) == (3, 6, 8)
    write(tmp_path / "preprocessor_config.json", "{")
    with pytest.raises(CheckpointError):
        image_shape(tmp_path, {**VIT, "image_size": 32})


def test_importing_is_cheap():
    code = "import sys, converters.onnx_export.eval_data; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "converters.onnx_export.preprocessing" in found
    assert not {"transformers", "torch", "PIL", "onnx", "onnxruntime"} & set(found)


# texts


def test_texts_are_padded_to_the_longest(tmp_path: Path):
    found = texts_of("bert", text_model(tmp_path))(["good film", "bad", "a good bad film"])
    wanted = {
        "input_ids": [
            [CLS, GOOD, FILM, SEP, PAD, PAD],
            [CLS, BAD, SEP, PAD, PAD, PAD],
            [CLS, UNK, GOOD, BAD, FILM, SEP],
        ],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
        "token_type_ids": [[0] * 6] * 3,
    }
    assert {name: array.tolist() for name, array in found.items()} == wanted
    assert {array.dtype for array in found.values()} == {np.dtype(np.int64)}


def test_pairs_have_types_of_their_tokens(tmp_path: Path):
    found = texts_of("bert", text_model(tmp_path))([("good", "bad film"), ("bad", "")])
    assert found["input_ids"].tolist() == [[CLS, GOOD, SEP, BAD, FILM, SEP], [CLS, BAD, SEP, SEP, PAD, PAD]]
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_a_graph_gets_its_inputs_and_no_others(tmp_path: Path):
    model = text_model(tmp_path, model_input_names=["input_ids"])  # what the tokenizer gives if not asked
    found = texts_of("distilbert", model)(["good"])
    assert {name: array.tolist() for name, array in found.items()} == {
        "input_ids": [[CLS, GOOD, SEP]],
        "attention_mask": [[1, 1, 1]],
    }


@pytest.mark.parametrize(
    ("model_type", "config", "options", "wanted"),
    [
        ("bert", {"max_position_embeddings": 5}, {}, 5),
        ("bert", {"max_position_embeddings": 9}, {"model_max_length": 4}, 4),
        ("bert", {"max_position_embeddings": 4}, {"model_max_length": 9}, 4),
        ("bert", {}, {}, 512),  # BERT's own
        ("gpt2", {"n_positions": 6}, {}, 6),
        ("roberta", {"max_position_embeddings": 7}, {}, 5),
        ("xlm-roberta", {"max_position_embeddings": 7}, {}, 5),
        ("camembert", {"max_position_embeddings": 7, "pad_token_id": 0}, {}, 6),
    ],
)
def test_texts_are_cut_to_what_the_model_takes(
    tmp_path: Path, model_type: str, config: dict, options: dict, wanted: int
):
    preprocess = texts_of(model_type, text_model(tmp_path, **options), **config)
    assert preprocess.max_length == wanted
    ids = preprocess(["film " * 600])["input_ids"]
    assert ids.tolist() == [[CLS, *[FILM] * (wanted - 2), SEP]]


def test_of_a_pair_the_longer_text_is_cut(tmp_path: Path):
    preprocess = texts_of("bert", text_model(tmp_path), max_position_embeddings=8)
    found = preprocess([("good bad", "film film film film film film")])
    assert found["input_ids"].tolist() == [[CLS, GOOD, BAD, SEP, FILM, FILM, FILM, SEP]]


@pytest.mark.parametrize(
    ("config", "tokens", "wanted"),
    [
        ({"pad_token_id": FILM}, {"pad": "[PAD]", "eos": "<end>"}, FILM),
        ({}, {"pad": "[UNK]", "eos": "<end>"}, UNK),
        ({}, {"pad": None, "eos": "<end>"}, END),
        ({"pad_token_id": -1}, {"pad": "[UNK]"}, UNK),
        ({"pad_token_id": len(WORDS)}, {"pad": "[UNK]"}, UNK),
    ],
)
def test_what_pads_is_what_the_model_finds_the_end_by(tmp_path: Path, config: dict, tokens: dict, wanted: int):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False, **tokens), **config)
    assert preprocess.pad_id == wanted
    found = preprocess(["good film", "bad"])
    assert found["input_ids"].tolist() == [[GOOD, FILM], [BAD, wanted]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_padding_stands_at_the_end_whatever_the_tokenizer_says(tmp_path: Path):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False, eos="<end>", padding_side="left"))
    found = preprocess(["bad", "good film"])
    assert found["input_ids"].tolist() == [[BAD, PAD], [GOOD, FILM]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_nothing_to_pad_with_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        texts_of("gpt2", text_model(tmp_path, template=False, pad=None))
    assert refusal(error) == (
        f"{tmp_path}: nothing to pad texts with; wanted a pad_token_id in config.json, or a pad_token or eos_token "
        "of the tokenizer"
    )


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path):
    write(tmp_path / "config.json", json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError) as error:
        texts_of("bert", tmp_path)
    assert refusal(error).startswith(f"{tmp_path}: no tokenizer; wanted one of tokenizer.json, vocab.txt, ")
    write(text_model(tmp_path) / "tokenizer.json", "{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be used") as error:
        texts_of("bert", tmp_path)
    refusal(error)


def test_a_text_without_tokens_is_refused(tmp_path: Path):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False))
    with pytest.raises(OptionError) as error:
        preprocess(["good", " "])
    assert refusal(error) == "the text ' ' has no tokens, wanted at least one"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    preprocess = texts_of("bert", text_model(tmp_path), vocab_size=FILM)
    preprocess(["good bad"])
    with pytest.raises(CheckpointError) as error:
        preprocess(["good bad", "film"])
    assert refusal(error) == (
        f"{tmp_path}: the tokenizer gives the token 6, the model has 6; wanted the tokenizer the model was trained "
        "with"
    )


# what is read


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
    "wanted 'label' and one of 'text' (perhaps with 'text_pair'), 'sentence' (perhaps with 'text_pair'), or "
    "'sentence1' with 'sentence2', each once"
)
CHOICES = "wanted one of 'cat', 'dog', 'horse', or an index below 3"


@pytest.mark.parametrize(
    ("text", "labels", "wanted"),
    [
        ("", LABELS, f" is empty, {COLUMNS}"),
        ("text,label\n", LABELS, ": no rows under its header, wanted an example in each"),
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
            ", line 2: the label is 'cow', wanted one of 'label 0', 'label 1', 'label 2', 'label 3', 'label 4', "
            "'label 5', ..., or an index below 40",
        ),
        *(
            (
                f"text,label\na,1\nb,{value}\n",
                ["LABEL_0"],
                f", line 3: the label is '{value}', wanted a finite number: the model predicts a value",
            )
            for value in ("high", "nan", "inf", "")
        ),
        *(
            (
                f"text,label\na,cat\n\n{row}\n",
                LABELS,
                f", line 4: {count} fields, wanted 2 as in the header; a field with a comma or a quote in it has to "
                "be quoted",
            )
            for row, count in (("b", 1), ("b,c,cat", 3))
        ),
        (
            'text,label\na,cat\n"b,cat\nc,dog\n',
            LABELS,
            ", line 3: not CSV (unexpected end of data), wanted fields with commas between them",
        ),
        ("text,label\na,cat\n", (), ": the model's config.json names no labels, wanted an id2label from '0' on"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, labels: Sequence[str], wanted: str):
    with pytest.raises(OptionError) as error:
        read_csv(tmp_path, text, labels)
    assert refusal(error) == f"{tmp_path / 'data.csv'}{wanted}"


def test_a_file_that_is_no_csv_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match=r"data\.csv: not UTF-8 .*, wanted a CSV file in UTF-8") as error:
        read_csv(tmp_path, "text,label\nbäd,cat\n", encoding="latin-1")
    refusal(error)
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path, TEXTS, LABELS)
    assert refusal(error) == f"{tmp_path}: cannot be read (Is a directory), wanted a CSV file"
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path / "none.csv", TEXTS, LABELS)
    assert refusal(error) == f"{tmp_path / 'none.csv'}: cannot be read (No such file or directory), wanted a CSV file"


@pytest.mark.parametrize(
    ("files", "labels", "wanted"),
    [
        (["cow/a.png"], LABELS, f"/pets/cow: no label has this name, {CHOICES}"),
        (["3/a.png"], LABELS, f"/pets/3: no label has this name, {CHOICES}"),
        (["a.png"], LABELS, "/pets: no class folders in it, wanted pets/LABEL/IMAGE"),
        (["cat/a.png"], ["LABEL_0"], "/pets: folders name classes, but the model predicts a single value, 'LABEL_0'"),
        (["cat/a.png"], (), "/pets: the model's config.json names no labels, wanted an id2label from '0' on"),
        (
            ["cat/a.png", "dog/deeper/a.png"],
            LABELS,
            "/pets/dog: no images in it, wanted files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, "
            ".tiff, .webp",
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
        assert refusal(error) == f"{path} {found}, wanted a folder with a folder of images for each class"


@pytest.mark.parametrize("task", ["token-classification", "text-generation", "feature-extraction"])
def test_other_kinds_are_refused(tmp_path: Path, task: str):
    with pytest.raises(OptionError) as error:
        read_eval_data(tmp_path, Kind(task, INPUTS["bert"], "logits"), LABELS)
    assert refusal(error) == f"eval data is for classifiers of images and of texts, this model does {task}"


# what is measured


def numbers(examples: Sequence[str]) -> dict[str, np.ndarray]:
    """A preprocessor of numbers."""
    return {"input": np.array([float(one) for one in examples], np.float32)}


def data_of(inputs: Sequence[float], targets: Sequence[float]) -> EvalData:
    return EvalData("numbers", tuple(str(one) for one in inputs), np.array(targets))


def near(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of the classes 0, 1, 2: the nearest number."""
    return -np.abs(inputs["input"][:, None] - np.arange(3, dtype=np.float32))


def test_images_are_measured_from_files(tmp_path: Path):
    colours = {"red": (200, 10, 20), "green": (10, 220, 30), "blue": (0, 0, 250)}
    for name, colour in colours.items():
        for i in range(3):
            save_picture(tmp_path / "colours" / name / f"{i}.png", Image.new("RGB", (9, 5 + i), colour))
    save_picture(tmp_path / "colours" / "blue" / "wrong.png", Image.new("RGB", (9, 5), colours["red"]))
    model = image_model(tmp_path / "model", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    data = read_eval_data(tmp_path / "colours", IMAGES, ["red", "green", "blue"])
    found = measure(lambda inputs: inputs["pixel_values"].mean((2, 3)), data, open_preprocessor(model, IMAGES, VIT))
    assert found.summary() == {"count": 10, "accuracy": 0.9}
    assert found.predictions.tolist() == [2, 2, 2, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_example_counts_once_whatever_the_batches(batch_size: int):
    data = data_of([0.1, 1.2, 1.9, 0.8, 2.4], [0, 1, 0, 1, 1])
    sizes = []

    def logits(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(inputs["input"]))
        return near(inputs)

    found = measure(logits, data, numbers, batch_size)
    assert found.summary() == {"count": 5, "accuracy": 0.6}
    assert found.predictions.tolist() == [0, 1, 2, 1, 2]
    assert sum(sizes) == 5
    assert max(sizes) == min(batch_size, 5)


def test_several_models_are_measured_on_what_was_preprocessed_once():
    calls = []

    def counted(examples: Sequence[str]) -> dict[str, np.ndarray]:
        calls.append(len(examples))
        return numbers(examples)

    prepared = list(batches(data_of([0, 1, 2, 2], [0, 1, 2, 0]), counted, 3))
    right, turned = score_of(near, prepared), score_of(lambda inputs: near(inputs)[:, ::-1], prepared)
    assert calls == [3, 1]
    assert (right.accuracy, turned.accuracy) == (0.75, 0.5)
    assert agreement(right, turned) == 0.25
    assert agreement(right, right) == 1.0


def test_values_are_measured_by_correlation_and_error():
    data = data_of([1, 2, 3, 5], [4.0, 5.0, 7.0, 8.0])
    found = measure(lambda inputs: 2 * inputs["input"][:, None], data, numbers, 3)
    assert found.predictions.tolist() == [2.0, 4.0, 6.0, 10.0]
    assert found.predictions.dtype == np.float64
    # around their means: -3.5, -1.5, 0.5, 4.5 and -2, -1, 1, 2
    pearson = (7 + 1.5 + 0.5 + 9) / (35 * 10) ** 0.5
    assert found.summary() == {"count": 4, "pearson": pytest.approx(pearson), "mean_absolute_error": 1.5}


def test_a_constant_has_no_correlation():
    found = measure(lambda inputs: np.ones((len(inputs["input"]), 1)), data_of([1, 2], [0.0, 1.0]), numbers)
    assert json.loads(json.dumps(found.summary())) == {"count": 2, "pearson": None, "mean_absolute_error": 0.5}


def test_agreement_of_values_falls_with_a_shift_and_with_a_scale():
    def score(*values: float) -> Score:
        return Score(len(values), np.array(values), pearson=1.0, mean_absolute_error=0.0)

    assert agreement(score(1, 2, 3), score(1, 2, 3)) == 1.0
    assert agreement(score(1, 2, 3), score(2, 3, 4)) == pytest.approx((4 / 3) / (2 / 3 + 2 / 3 + 1))
    assert agreement(score(1, 2, 3), score(2, 4, 6)) == pytest.approx((8 / 3) / (2 / 3 + 8 / 3 + 4))
    assert agreement(score(1, 2, 3), score(3, 2, 1)) == pytest.approx(-1.0)
    assert agreement(score(2, 2), score(2, 2)) == 1.0
    assert agreement(score(2, 2), score(3, 3)) == 0.0
    with pytest.raises(ValueError, match="scores of 2 and of 3 examples cannot be compared"):
        agreement(score(1, 2), score(1, 2, 3))


@pytest.mark.parametrize(
    ("logits", "targets", "wanted"),
    [
        (np.zeros((1, 3)), [0, 1], r"gives logits \(1, 3\), wanted \(2, labels\)"),
        (np.zeros((2, 4, 3)), [0, 1], r"gives logits \(2, 4, 3\), wanted \(2, labels\)"),
        (np.zeros((2, 3)), [0.0, 1.0], r"gives logits \(2, 3\), wanted \(2, 1\)"),
        (np.array([[0, 1], [np.nan, 1]]), [0, 1], "gives logits that are NaN or infinite"),
        (np.array([[0, 1], [np.inf, 1]]), [0, 1], "gives logits that are NaN or infinite"),
    ],
)
def test_logits_that_say_nothing_are_refused(logits: np.ndarray, targets: list, wanted: str):
    with pytest.raises(VerificationError, match=wanted) as error:
        measure(lambda inputs: logits, data_of([1, 2], targets), numbers)
    refusal(error)
