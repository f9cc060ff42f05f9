"""The two protocols, by the clients that people use: `huggingface_hub.InferenceClient` and `tritonclient[http]`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from support.classify.exports import TEXTS
from support.classify.serving import PATIENCE, classifying, digit
from support.media.sound_files import save_sound, sound

from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.serving.server import TaskServer

pytestmark = pytest.mark.slow  # traces models

NAMES = ["angry", "digits", "features", "happy", "mood", "names", "sentences", "sober", "sounds", "squad", "tired"]


@pytest.fixture(scope="module")
def served(exports: Path) -> Iterator[tuple[str, TaskServer]]:
    with classifying(exports) as found:
        yield found


@pytest.fixture
def url(served: tuple[str, TaskServer], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # it holds for the client and loopback, too
    return served[0]


@pytest.fixture
def client(url: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(
        url.removeprefix("http://"), connection_timeout=PATIENCE, network_timeout=PATIENCE
    )


def hub(url: str, name: str) -> InferenceClient:
    return InferenceClient(model=f"{url}/models/{name}", timeout=PATIENCE)


def test_images_by_the_hub_client(url: str, exports: Path, tmp_path: Path) -> None:
    file = tmp_path / "digit.png"
    file.write_bytes(digit(1))
    (wanted,) = OnnxEngine(exports / "digits").predict([file])
    found = hub(url, "digits").image_classification(digit(1))
    assert [(one.label, one.score) for one in found] == [(one.label, pytest.approx(one.score)) for one in wanted]
    best = hub(url, "digits").image_classification(digit(1), top_k=1, function_to_apply="sigmoid")
    assert [one.label for one in best] == [wanted[0].label]
    assert 0 < best[0].score < 1
    assert best[0].score != pytest.approx(wanted[0].score, abs=1e-6)


def test_texts_by_the_hub_client(url: str, exports: Path) -> None:
    (wanted,) = OnnxEngine(exports / "mood").predict([TEXTS[0]])
    found = hub(url, "mood").text_classification(TEXTS[0])
    assert [(one.label, one.score) for one in found] == [(one.label, pytest.approx(one.score)) for one in wanted]
    (best,) = hub(url, "mood").text_classification(TEXTS[0], top_k=1, function_to_apply="none")
    assert best.label == wanted[0].label
    small = hub(url, "mood:int8").text_classification(TEXTS[0])
    assert small[0].score == pytest.approx(wanted[0].score, abs=0.1)


def test_entities_by_the_hub_client(url: str, exports: Path) -> None:
    text = TEXTS[3]
    (wanted,) = OnnxEngine(exports / "names").entities([text])
    found = hub(url, "names").token_classification(text)
    assert [(one.entity_group, one.start, one.end, one.word) for one in found] == [
        (one.label, one.start, one.end, one.text) for one in wanted
    ]
    tokens = hub(url, "names").token_classification(text, aggregation_strategy="none", ignore_labels=[])
    assert [one.word for one in tokens] == text.split()
    assert {one.entity for one in tokens} <= {"O", "B-X", "I-X"}
    assert hub(url, "names").token_classification(text, ignore_labels=["X"]) == [] or any(
        one.entity_group == "O" for one in hub(url, "names").token_classification(text, ignore_labels=["X"])
    )


def test_features_by_the_hub_client(url: str, exports: Path) -> None:
    wanted = OnnxEngine(exports / "sentences").embeddings(TEXTS)
    np.testing.assert_allclose(hub(url, "sentences").feature_extraction(TEXTS[0]), wanted[0], rtol=1e-4, atol=1e-5)
    several = hub(url, "sentences").feature_extraction(list(TEXTS), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(several, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(several[2], wanted[2] / np.linalg.norm(wanted[2]), rtol=1e-4, atol=1e-5)
    assert hub(url, "features").feature_extraction(TEXTS[0]).shape == (4, 32)


def test_sounds_by_the_hub_client(url: str, exports: Path, tmp_path: Path) -> None:
    """Of unequal lengths at the same time: what is padded would get another answer."""
    files = [save_sound(tmp_path / f"{count}.wav", sound(count, count)) for count in (900, 1503)]
    wanted = OnnxEngine(exports / "sounds").predict(files)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda file: hub(url, "sounds").audio_classification(file), files))
    for own, labels in zip(wanted, found, strict=True):
        assert [(one.label, one.score) for one in labels] == [(one.label, pytest.approx(one.score)) for one in own]
    (best,) = hub(url, "sounds").audio_classification(files[0].read_bytes(), top_k=1)
    assert best.label == wanted[0][0].label
    with pytest.raises(HfHubHTTPError, match="was trained on 16000; convert it"):
        hub(url, "sounds").audio_classification(save_sound(tmp_path / "slow.wav", sound(900), 8000))
    with pytest.raises(HfHubHTTPError, match="a sound has 61.0 seconds, the limit is 60; split it"):
        hub(url, "sounds").audio_classification(save_sound(tmp_path / "long.wav", sound(16000 * 61), bits=8))


def test_questions_by_the_hub_client(url: str, exports: Path) -> None:
    pairs = [("good", "bad film film"), ("bad film", "good"), ("film", "bad good film good bad bad")]
    wanted = OnnxEngine(exports / "squad").answers(pairs, top_k=2)
    client = hub(url, "squad")

    def ask(pair: tuple[str, str]) -> list[Any]:
        return [client.question_answering(question=pair[0], context=pair[1], top_k=top_k) for top_k in (None, 2)]

    with ThreadPoolExecutor(3) as pool:  # in one batch, as well as they can
        found = list(pool.map(ask, pairs))
    for (best, both), own in zip(found, wanted, strict=True):
        places = [(one.answer, one.start, one.end, pytest.approx(one.score)) for one in both]
        assert places == [(one.text, one.start, one.end, one.score) for one in own]
        assert (best.answer, best.start, best.end) == (own[0].text, own[0].start, own[0].end)
    with pytest.raises(HfHubHTTPError, match="split it: the rest would be ignored"):
        client.question_answering(question="good", context="bad " * 30)
    with pytest.raises(HfHubHTTPError, match="does not support the parameter doc_stride"):
        client.question_answering(question="good", context="bad", doc_stride=8)


def test_similarities_by_the_hub_client(url: str, exports: Path) -> None:
    first, *others = OnnxEngine(exports / "sentences").embeddings(TEXTS)
    wanted = [first @ one / np.linalg.norm(first) / np.linalg.norm(one) for one in others]
    assert hub(url, "sentences").sentence_similarity(TEXTS[0], list(TEXTS[1:])) == pytest.approx(wanted, abs=1e-5)


def test_what_the_hub_client_cannot_have_is_an_error_with_a_sentence(url: str) -> None:
    with pytest.raises(HfHubHTTPError, match="aggregation_strategy is first, which is not supported"):
        hub(url, "names").token_classification("good", aggregation_strategy="first")
    with pytest.raises(HfHubHTTPError, match="does not support the parameter stride"):
        hub(url, "names").token_classification("good", stride=1)
    with pytest.raises(HfHubHTTPError, match="has 27 tokens, and the model takes 24; split it"):
        hub(url, "mood").text_classification("good " * 25)
    with pytest.raises(HfHubHTTPError) as error:
        hub(url, "nope").text_classification("good")
    assert error.value.response.status_code == 404
    assert "there is no task nope; the available tasks are angry" in error.value.response.json()["error"]


def test_lists_and_pairs_of_texts(url: str) -> None:
    def ask(inputs: object) -> httpx.Response:
        return httpx.post(f"{url}/models/mood", json={"inputs": inputs}, timeout=PATIENCE)

    several = ask(list(TEXTS))
    assert [len(one) for one in several.json()] == [3] * len(TEXTS)
    pair = ask({"text": "good", "text_pair": "bad"})
    assert pair.json() != ask("good bad").json()
    assert [len(one) for one in pair.json()] == [3]


def test_headers_name_the_version(url: str, client: triton.InferenceServerClient) -> None:
    found = httpx.post(f"{url}/models/mood", json={"inputs": "good"}, timeout=PATIENCE)
    assert found.headers["x-peanut-variant"] == "mood"
    assert [found.headers["x-peanut-digest"]] == client.get_model_metadata("mood")["versions"]


def test_metadata_by_triton_client(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]
    found = client.get_model_metadata("mood")
    (version,) = found["versions"]
    assert found["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [one["name"] for one in found["outputs"]] == ["logits", "scores"]
    assert client.is_model_ready("mood")
    assert client.is_model_ready("mood", version)
    assert not client.is_model_ready("mood", "0" * 40)
    assert not client.is_model_ready("nope")


@pytest.mark.parametrize("is_binary", [True, False])
def test_texts_by_triton_client(client: triton.InferenceServerClient, exports: Path, is_binary: bool) -> None:
    engine = OnnxEngine(exports / "mood")
    wanted = np.concatenate([engine.run(engine._preprocessor(engine.find(None))([text])) for text in TEXTS])
    given = triton.InferInput("text", [len(TEXTS)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in TEXTS], object), binary_data=is_binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("scores", "logits")]
    (version,) = client.get_model_metadata("mood")["versions"]
    found = client.infer("mood", [given], model_version=version, outputs=outputs, request_id="seven")
    assert found.get_response()["id"] == "seven"
    assert found.get_response()["model_version"] == version
    np.testing.assert_allclose(found.as_numpy("logits"), wanted, atol=1e-5)
    np.testing.assert_allclose(found.as_numpy("scores").sum(1), 1, rtol=1e-5)


def test_tensors_by_triton_client(client: triton.InferenceServerClient, exports: Path) -> None:
    """What the client prepared, padded by itself; and pixels."""
    engine = OnnxEngine(exports / "mood")
    arrays = engine._preprocessor(engine.find(None))(TEXTS)
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    found = client.infer("mood", inputs).as_numpy("logits")
    np.testing.assert_allclose(found, engine.run(arrays), atol=1e-5)
    pixels = np.random.default_rng(0).standard_normal((3, 1, 16, 16), np.float32)
    image = triton.InferInput("pixel_values", pixels.shape, "FP32")
    image.set_data_from_numpy(pixels, binary_data=False)
    found = client.infer("digits", [image]).as_numpy("logits")
    np.testing.assert_allclose(found, OnnxEngine(exports / "digits").run({"pixel_values": pixels}), atol=1e-4)


def test_images_and_classes_by_triton_client(client: triton.InferenceServerClient, url: str) -> None:
    given = triton.InferInput("image", [2], "BYTES")
    given.set_data_from_numpy(np.array([digit(1), digit(2)], object))
    found = client.infer("digits", [given], outputs=[triton.InferRequestedOutput("scores", class_count=2)])
    for seed, row in zip((1, 2), found.as_numpy("scores"), strict=True):
        wanted = hub(url, "digits").image_classification(digit(seed), top_k=2)
        assert [one.decode().split(":")[2] for one in row] == [one.label for one in wanted]
        assert [float(one.decode().split(":")[0]) for one in row] == pytest.approx(
            [one.score for one in wanted], abs=1e-5
        )


def test_sounds_and_questions_by_triton_client(
    client: triton.InferenceServerClient, tmp_path: Path, url: str
) -> None:
    assert client.get_model_metadata("sounds")["inputs"] == [{"name": "sound", "datatype": "BYTES", "shape": [-1]}]
    content = save_sound(tmp_path / "a.wav", sound(900)).read_bytes()
    given = triton.InferInput("sound", [1], "BYTES")
    given.set_data_from_numpy(np.array([content], object))
    found = client.infer("sounds", [given]).as_numpy("scores")[0]
    wanted = {one.label: one.score for one in hub(url, "sounds").audio_classification(content)}
    assert sorted(found) == pytest.approx(sorted(wanted.values()), abs=1e-5)

    described = client.get_model_metadata("squad")
    assert [one["name"] for one in described["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    inputs = [triton.InferInput(one["name"], [1, 5], one["datatype"]) for one in described["inputs"]]
    for one, row in zip(inputs, ([2, 4, 3, 5, 3], [1] * 5, [0, 0, 0, 1, 1]), strict=True):
        one.set_data_from_numpy(np.array([row], np.int64))
    assert client.infer("squad", inputs).as_numpy("end_logits").shape == (1, 5)
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"good"], object))
    with pytest.raises(
        triton.InferenceServerException, match="squad takes input_ids, attention_mask, token_type_ids"
    ):
        client.infer("squad", [text])


def test_outputs_by_token_have_lengths(client: triton.InferenceServerClient) -> None:
    given = triton.InferInput("text", [2], "BYTES")
    given.set_data_from_numpy(np.array([b"good", b"good bad film"], object))
    found = client.infer("names", [given])
    assert found.as_numpy("lengths").tolist() == [3, 5]
    assert found.as_numpy("logits").shape == (2, 5, 3)
    assert not found.as_numpy("logits")[0, 3:].any()


def test_what_triton_client_cannot_have_is_an_error_with_a_sentence(client: triton.InferenceServerClient) -> None:
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"good"], object))
    wrong = triton.InferInput("texts", [1], "BYTES")
    wrong.set_data_from_numpy(np.array([b"good"], object))
    for inputs, more, said in (
        ([text], {"model_version": "1"}, "mood is at version"),
        ([wrong], {}, "mood takes BYTES as text, or input_ids"),
        ([text], {"outputs": [triton.InferRequestedOutput("probabilities")]}, "mood has no output probabilities"),
        ([text], {"request_compression_algorithm": "gzip"}, "the body is compressed"),
        ([text], {"priority": 1}, "priority is not supported"),
    ):
        with pytest.raises(triton.InferenceServerException, match=said):
            client.infer("mood", inputs, **more)


def test_metrics_have_a_bounded_number_of_names(url: str) -> None:
    for number in range(3):
        httpx.post(f"{url}/models/made-up-{number}", json={"inputs": "good"}, timeout=PATIENCE)
    httpx.post(f"{url}/models/mood", json={"inputs": "good"}, timeout=PATIENCE)
    found = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    assert "made-up" not in found
    assert 'peanut_requests_total{outcome="404",variant="unknown"}' in found
    for name in ("requests_total", "request_seconds_count", "batches_total", "batch_rows_sum", "run_seconds_count"):
        assert f"peanut_{name}" in found
    assert "peanut_ready 1.0" in found
    assert httpx.get(f"{url}/models", timeout=PATIENCE).json() == NAMES
