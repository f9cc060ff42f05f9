"""The server of tasks, in its process: the answers of the right task, as alone, while files and memory change."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.classify.exports import LABELS, TASKS, TEXTS, export_tasks
from support.classify.serving import digit
from support.classify.stand_ins import exchange
from support.tiny_models import edit_json

from converters.errors import OptionError
from converters.outputs.onnx.plan import Form
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.serving.answering import Ask
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.errors import QueueFullError, RequestTooLargeError, UnknownVariantError, VariantError

pytestmark = pytest.mark.slow  # traces models

PATIENCE = 300  # seconds of a whole test


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, PATIENCE)

    asyncio.run(bounded())


@asynccontextmanager
async def serving(*folders: Path, **limits: Any) -> AsyncIterator[TaskServer]:
    async with TaskServer(folders, limits=Limits(**{"threads": 1, "wait_seconds": PATIENCE, **limits})) as server:
        yield server


def logits(engine: OnnxEngine, text: str, task: str | None = None) -> np.ndarray:
    """What a text gives alone."""
    found = engine.find(task)
    return engine.run(engine._preprocessor(found)([text]), found.name)[0]


def test_every_form_answers_as_the_engine(tmp_path: Path) -> None:
    tasks = TASKS[:2]
    folders = export_tasks(tmp_path, [Form.SHARED, Form.SELF_MERGING, Form.SWAPPABLE], tasks)

    async def test(folder: Path) -> None:
        engine = OnnxEngine(folder, threads=1)
        async with serving(folder) as server:
            for task in engine.tasks:
                found = await server.predict(task, TEXTS, Ask(top_k=9))
                for text, labels in zip(TEXTS, found.answers, strict=True):
                    (wanted,) = engine.predict([text], task, top_k=9)
                    assert [one.label for one in labels] == [one.label for one in wanted]
                    assert [one.score for one in labels] == pytest.approx([one.score for one in wanted], abs=1e-5)
            assert server.sessions.open_graphs == (2 if "swappable" not in folder.name else 1)

    for folder in folders:
        run(test(folder))
    digests = {asyncio.run(digest_of(folder, tasks[0])) for folder in folders}
    assert len(digests) == 3


async def digest_of(folder: Path, name: str) -> str:
    async with serving(folder) as server:
        return (await server.version(name)).digest


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("mood", 1e-5), ("mood:fp16", 5e-3), ("names", 1e-5), ("sentences", 1e-5), ("features", 1e-4)],
)
def test_a_batch_gives_what_each_text_gives_alone(exports: Path, name: str, tolerance: float) -> None:
    """Texts of unequal length, so that there is padding; the numbers differ by rounding only."""

    async def test() -> None:
        async with serving(exports, max_batch=4, max_delay=0.5) as server:
            alone = [(await server.outputs(name, [text])).rows[0] for text in TEXTS]
            together = (await server.outputs(name, TEXTS)).rows
            batches = server.metrics.registry.get_sample_value("peanut_batch_rows_sum", {"variant": name})
            runs = server.metrics.registry.get_sample_value("peanut_batches_total", {"variant": name})
            assert batches == 2 * len(TEXTS)
            assert runs < batches, "nothing was batched"
            for one, other in zip(alone, together, strict=True):
                assert [output.shape for output in one] == [output.shape for output in other]
                np.testing.assert_allclose(one[0], other[0], atol=tolerance, rtol=tolerance)

    run(test())


def test_int8_is_not_batched_since_a_batch_would_change_it(exports: Path) -> None:
    """Activations of all rows share one scale per tensor."""
    engine = OnnxEngine(exports / "mood", precision="int8", threads=1)
    preprocess = engine._preprocessor(engine.find(None))
    alone = np.concatenate([engine.run(preprocess([text])) for text in TEXTS])
    assert np.abs(engine.run(preprocess(TEXTS)) - alone).max() > 1e-4, "int8 could be batched now"
    assert engine.predict(TEXTS) == [engine.predict([text])[0] for text in TEXTS]

    async def test() -> None:
        async with serving(exports, max_batch=4, max_delay=0.1) as server:
            found = (await server.outputs("mood:int8", TEXTS)).rows
            np.testing.assert_array_equal(np.concatenate([row[0] for row in found]), alone)

    run(test())


def test_tasks_do_not_mix_under_200_requests_at_once(exports: Path) -> None:
    """Each answer has the labels and the numbers of its own task and text, while one graph changes adapters."""
    engine = OnnxEngine(exports / "swappable", threads=1)
    wanted = {(task, text): logits(engine, text, task) for task in TASKS for text in TEXTS}
    asked = [(task, text) for task in TASKS for text in TEXTS] * 13
    random.Random(0).shuffle(asked)

    async def test() -> None:
        async with serving(exports / "swappable", max_queue=500, max_delay=0.01) as server:
            found = await asyncio.gather(*(ask(server, task, text) for task, text in asked[:200]))
            assert server.sessions.open_graphs == 1
            runs = sum(
                server.metrics.registry.get_sample_value("peanut_batches_total", {"variant": task}) or 0
                for task in TASKS
            )
            assert runs < 150, "nothing was batched"
        for (task, text), (labels, row) in zip(asked[:200], found, strict=True):
            assert labels == set(LABELS[task])
            np.testing.assert_allclose(row, wanted[task, text], atol=1e-4)

    async def ask(server: TaskServer, task: str, text: str) -> tuple[set[str], np.ndarray]:
        found = await server.predict(task, [text], Ask(function="none"))
        (labels,) = found.answers
        scores = {one.label: one.score for one in labels}
        return set(scores), np.array([scores.get(label, np.nan) for label in LABELS[task]])

    run(test())


def test_what_was_not_used_for_longest_is_evicted(exports: Path) -> None:
    async def test() -> None:
        async with serving(exports) as server:
            sizes = {}
            for name in ("mood", "names", "features"):
                before = server.sessions.nbytes
                await server.load(name)
                sizes[name] = server.sessions.nbytes - before
        room = sizes["mood"] + sizes["names"] + sizes["features"] // 2
        async with serving(exports, memory=room) as server:
            for name in ("mood", "names", "mood", "features"):
                await server.predict(name, ["good film"])
                assert server.sessions.nbytes <= room
            assert server.sessions.open_names() == {"mood", "features"}
            assert server.sessions.evictions == 1
            await asyncio.gather(*(server.predict(name, ["bad"]) for name in ("names", "mood", "features") * 10))
            assert server.sessions.nbytes <= room
        async with serving(exports, memory=1000) as server:
            with pytest.raises(VariantError, match=r"mood needs .*, more than --memory"):
                await server.predict("mood", ["good film"])

    run(test())


def test_a_task_is_replaced_under_load(tmp_path: Path, exports: Path) -> None:
    """Every answer is that of the version in its digest, and a request after the replacement gets the new one."""
    versions = [shutil.copytree(exports / "mood", tmp_path / f"v{i}") for i in (1, 2)]
    edit_json(versions[1] / "config.json", id2label={"0": "awful", "1": "middling", "2": "great"})
    link = tmp_path / "served" / "mood"
    link.parent.mkdir()
    exchange(link, versions[0])

    async def test() -> None:
        labels_of: dict[str, set[frozenset[str]]] = {}
        is_over = False

        async def client(server: TaskServer) -> None:
            while not is_over:
                found = await server.predict("mood", ["good film"])
                (labels,) = found.answers
                labels_of.setdefault(found.version.digest, set()).add(frozenset(one.label for one in labels))

        async with serving(link) as server:
            clients = [asyncio.create_task(client(server)) for _ in range(8)]
            for turn in range(1, 9):
                exchange(link, versions[turn % 2])
                (labels,) = (await server.predict("mood", ["good film"])).answers
                assert ("great" in {one.label for one in labels}) == (turn % 2 == 1)
                await asyncio.sleep(0.02)
            is_over = True
            await asyncio.gather(*clients)
            assert server.sessions.open_graphs == 1
        assert len(labels_of) == 2
        assert all(len(labels) == 1 for labels in labels_of.values()), "a digest gave two kinds of answers"

    run(test())


def write_zeros(folder: Path) -> None:
    """A graph that is not the one in the manifest."""
    file = folder / "model.onnx"
    file.write_bytes(bytes(file.stat().st_size))


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [write_zeros, drop_tokenizer])
def test_a_broken_replacement_never_answers(tmp_path: Path, exports: Path, damage: Callable[[Path], None]) -> None:
    folder, broken = (shutil.copytree(exports / "mood", tmp_path / name) for name in ("good", "bad"))
    damage(broken)
    link = tmp_path / "mood"
    exchange(link, folder)

    async def test() -> None:
        async with serving(link) as server:
            first = await server.predict("mood", ["good film"])
            exchange(link, broken)
            for _ in range(3):
                with pytest.raises(VariantError, match="mood cannot be served: "):
                    await server.predict("mood", ["good film"])
            exchange(link, folder)
            again = await server.predict("mood", ["good film"])
            assert again.version.digest == first.version.digest
            assert again.answers == first.answers

    run(test())


def test_two_renames_lose_no_request(tmp_path: Path, exports: Path) -> None:
    """Between them the folder is away for a moment."""
    folder = shutil.copytree(exports / "mood", tmp_path / "mood")

    async def test() -> None:
        async with serving(folder) as server:
            await server.predict("mood", ["good film"])
            folder.rename(tmp_path / "away")
            waiting = asyncio.create_task(server.predict("mood", ["good film"]))
            await asyncio.sleep(0.1)
            (tmp_path / "away").rename(folder)
            assert (await waiting).answers
            folder.rename(tmp_path / "away")
            with pytest.raises(UnknownVariantError, match="were not found"):
                await server.predict("mood", ["good film"])

    run(test())


def test_requests_that_cannot_be_answered_are_refused(exports: Path) -> None:
    async def test() -> None:
        async with serving(exports, max_queue=4, max_inputs=3, max_pixels=100) as server:
            for name, inputs, said in (
                ("mood", [Path("/etc/passwd")], "an input is a path"),
                ("digits", [Path("/etc/passwd")], "an input is a path"),
                ("mood", [b"\x89PNG"], "the model takes texts"),
                ("digits", ["good film"], "the model takes images"),
                ("digits", [b"no image"], "cannot be read as an image"),
                ("digits", [digit(0, side=11)], "11 x 11 pixels, at most 100 are decoded"),
                ("mood", ["good " * 30], "has 32 tokens, and the model takes 24"),
                ("mood", ["x" * 300_000], "has 300000 characters, the limit is 200000"),
                ("names", [("good", "bad")], "takes single texts, not pairs"),
                ("mood", [""], None),
            ):
                if said is None:
                    await server.predict(name, inputs)
                    continue
                with pytest.raises(OptionError, match=said):
                    await server.predict(name, inputs)
            assert (await server.predict("mood", ["good " * 30], Ask(truncate=True))).answers
            with pytest.raises(OptionError, match="normalize"):
                await server.predict("mood", ["good"], Ask(normalize=True))
            for count in (0, 4):
                with pytest.raises(RequestTooLargeError, match=f"the request has {count} inputs; expected 1 to 3"):
                    await server.predict("mood", ["good"] * count)
            with pytest.raises(UnknownVariantError, match="mood is at version .*, not old"):
                await server.predict("mood", ["good"], digest="old")
            found = await asyncio.gather(
                *(server.predict("mood", ["good", "bad"]) for _ in range(5)), return_exceptions=True
            )
            refused = [one for one in found if isinstance(one, QueueFullError)]
            assert len(refused) == 3, found
            assert "4 inputs are waiting, the limit is 4" in str(refused[0])
            assert server.waiting == 0

    run(test())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input_ids": np.ones((1, 3), np.int64)}, "the inputs are input_ids; expected input_ids, attention_mask"),
        ({"input_ids": np.ones((1, 3), np.int32)}, "expected int64"),
        ({"input_ids": np.ones((1, 25), np.int64)}, "the model takes 24 tokens"),
        ({"input_ids": np.full((1, 3), 99)}, "the model has tokens 0 to 7"),
        ({"input_ids": np.full((1, 3), -1)}, "the model has tokens 0 to 7"),
        ({"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)}, "without a 1"),
        ({"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)}, "the same shape"),
    ],
)
def test_arrays_that_the_graph_does_not_take_are_refused(
    exports: Path, arrays: dict[str, np.ndarray], said: str
) -> None:
    if len(arrays) == 1 and "expected input_ids, attention_mask" not in said:
        shape = arrays["input_ids"].shape
        arrays = {**arrays, "attention_mask": np.ones(shape, arrays["input_ids"].dtype)}
    if "attention_mask" in arrays:
        arrays = {**arrays, "token_type_ids": np.zeros_like(arrays["input_ids"])}

    async def test() -> None:
        async with serving(exports) as server:
            with pytest.raises(OptionError, match=said):
                await server.infer("mood", arrays)

    run(test())
