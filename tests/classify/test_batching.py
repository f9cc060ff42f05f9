"""Which rows share a run, in which order, and what a run that fails does to the others."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from converters.errors import OptionError
from converters.inference.kinds import ModelKind
from peanut_serve.classify.serving.batching import Batcher, Job
from peanut_serve.errors import EngineDownError

KIND = ModelKind("token-classification", ("input_ids", "attention_mask"), ("logits",))
PAD = 7


class Graph:
    """Answers with each token and its mask, so that padding and mixing are seen; waits for `gate` in each run."""

    def __init__(self, batches: bool = True) -> None:
        self.runs: list[np.ndarray] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        loaded = SimpleNamespace(run_all=self.run_all, task=SimpleNamespace(kind=KIND))
        self.task: Any = SimpleNamespace(
            version=object(), loaded=loaded, preparer=SimpleNamespace(pad_id=PAD), batches=batches
        )

    def run_all(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.began.set()
        assert self.gate.wait(10)
        self.runs.append(arrays["input_ids"])
        if (arrays["input_ids"] == 666).any():
            raise OptionError("a bad row")
        return [np.stack([arrays["input_ids"], arrays["attention_mask"]], -1).astype(np.float32)]

    def job(self, *tokens: int) -> Job:
        ids = np.array([tokens], np.int64)
        return Job(self.task, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


@pytest.fixture
def batcher():
    made = Batcher(max_batch=4, max_delay=0.02, observe=lambda *_: None)
    yield made
    made.close()


def tokens(job: Job) -> list[float]:
    (output,) = job.outputs.result(10)
    assert (output[..., 1] == 1).all(), "padding is in the outputs"
    return output[0, :, 0].tolist()


def held(batcher: Batcher, graph: Graph, jobs: list[Job]) -> None:
    """Submit jobs while the only runner is busy with another."""
    graph.gate.clear()
    first = graph.job(1)
    batcher.submit(first)
    assert graph.began.wait(10)
    for job in jobs:
        batcher.submit(job)
    graph.gate.set()
    assert tokens(first) == [1.0]


def test_rows_that_wait_share_a_run_and_get_their_own_answers(batcher: Batcher) -> None:
    graph = Graph()
    jobs = [graph.job(*range(10, 10 + length)) for length in (3, 2, 3, 4, 3)]
    held(batcher, graph, jobs)
    assert [tokens(job) for job in jobs] == [[*range(10, 10 + length)] for length in (3, 2, 3, 4, 3)]
    assert [len(run) for run in graph.runs] == [1, 4, 1]
    assert graph.runs[1].shape == (4, 3)
    assert graph.runs[1][3].tolist() == [10, 11, PAD]


def test_versions_never_share_a_run_and_the_oldest_is_first(batcher: Batcher) -> None:
    graph, other = Graph(), Graph()
    jobs = [graph.job(10), other.job(20), graph.job(11), other.job(21)]
    held(batcher, graph, jobs)
    assert [tokens(job) for job in jobs] == [[10], [20], [11], [21]]
    assert [run.ravel().tolist() for run in (*graph.runs[1:], *other.runs)] == [[10, 11], [20, 21]]


def test_a_version_whose_rows_do_not_batch_runs_them_one_by_one(batcher: Batcher) -> None:
    graph = Graph(batches=False)
    jobs = [graph.job(1, 2), graph.job(3, 4)]
    held(batcher, graph, jobs)
    assert [tokens(job) for job in jobs] == [[1, 2], [3, 4]]
    assert [len(run) for run in graph.runs] == [1, 1, 1]


def test_a_batch_is_never_mostly_padding(batcher: Batcher) -> None:
    graph = Graph()
    jobs = [graph.job(5), graph.job(*range(40)), graph.job(6)]
    held(batcher, graph, jobs)
    assert [len(tokens(job)) for job in jobs] == [1, 40, 1]
    assert [run.shape for run in graph.runs] == [(1, 1), (2, 1), (1, 40)]


def test_rows_of_one_length_are_run_together(batcher: Batcher) -> None:
    """The oldest row is first, and gets those that are closest to it in length, not those that came next."""
    graph = Graph()
    jobs = [graph.job(*range(10, 10 + length)) for length in (8, 12, 7, 11, 9, 12, 8, 11)]
    held(batcher, graph, jobs)
    assert [len(tokens(job)) for job in jobs] == [8, 12, 7, 11, 9, 12, 8, 11]
    assert [run.shape for run in graph.runs[1:]] == [(4, 9), (4, 12)]


def test_a_bad_row_does_not_fail_the_others(batcher: Batcher) -> None:
    graph = Graph()
    jobs = [graph.job(1), graph.job(666), graph.job(3)]
    held(batcher, graph, jobs)
    assert tokens(jobs[0]) == [1]
    assert tokens(jobs[2]) == [3]
    with pytest.raises(OptionError, match="a bad row"):
        jobs[1].outputs.result(10)


def test_a_cancelled_job_is_not_run(batcher: Batcher) -> None:
    graph = Graph()
    given_up, wanted = graph.job(8), graph.job(9)
    assert given_up.outputs.cancel()
    held(batcher, graph, [given_up, wanted])
    assert tokens(wanted) == [9]
    assert not any((run == 8).any() for run in graph.runs)


def test_a_row_waits_for_others_but_not_longer_than_it_may() -> None:
    batcher, graph = Batcher(max_batch=2, max_delay=0.5, observe=lambda *_: None), Graph()
    try:
        first, second = graph.job(1), graph.job(2)
        batcher.submit(first)
        time.sleep(0.05)
        batcher.submit(second)
        assert tokens(first) == [1]
        assert time.monotonic() - first.arrived < 0.45, "a full batch waited"
        assert [len(run) for run in graph.runs] == [2]
        alone = graph.job(3)
        batcher.submit(alone)
        assert tokens(alone) == [3]
        assert time.monotonic() - alone.arrived >= 0.5
    finally:
        batcher.close()


def test_a_row_does_not_wait_if_nothing_is_on_its_way() -> None:
    batcher, graph = Batcher(max_batch=2, max_delay=5.0, observe=lambda *_: None, expects=lambda: False), Graph()
    try:
        job = graph.job(1)
        batcher.submit(job)
        assert tokens(job) == [1]
        assert time.monotonic() - job.arrived < 2.5
    finally:
        batcher.close()


def test_closing_answers_what_was_submitted_and_nothing_later() -> None:
    batcher, graph = Batcher(max_batch=2, max_delay=5.0, observe=lambda *_: None), Graph()
    jobs = [graph.job(number) for number in range(5)]
    for job in jobs:
        batcher.submit(job)
    batcher.close()
    assert [tokens(job) for job in jobs] == [[number] for number in range(5)]
    with pytest.raises(EngineDownError, match="stopping"):
        batcher.submit(graph.job(9))


def test_an_observer_is_told_of_each_run() -> None:
    told: list[tuple[object, int]] = []
    graph = Graph()
    batcher = Batcher(4, 0.0, lambda version, rows, seconds: told.append((version, rows)))
    job = graph.job(1)
    assert isinstance(job.outputs, Future)
    batcher.submit(job)
    assert tokens(job) == [1]
    batcher.close()
    assert told == [(graph.task.version, 1)]
