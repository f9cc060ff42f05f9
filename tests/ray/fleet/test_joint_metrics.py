"""The metrics of several replicas on one page."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peanut_serve.ray.fleet.metrics import joined, labelled


def page(number: int) -> str:
    registry = CollectorRegistry()
    Gauge("ready", 'with \\ and "quotes"\nand lines', registry=registry).set(number)
    Counter("requests", "requests", ["variant"], registry=registry).labels('odd "name" \\ \n').inc(number)
    Histogram("wait_seconds", "wait", ["replica"], buckets=(1, 2), registry=registry).labels("theirs").observe(number)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_sample_of_every_replica_is_there_once_with_its_label() -> None:
    pages = {name: page(number) for number, name in enumerate(("a", "b", "c"))}
    text = joined([labelled(own, name) for name, own in pages.items()], dict.fromkeys(pages, True))
    expected = {("peanut_replica_up", frozenset({("replica", name)})): 1.0 for name in pages}
    for name, own in pages.items():
        for (metric, labels), value in samples(own).items():
            kept = {("exported_replica" if key == "replica" else key, text) for key, text in labels}
            expected[metric, frozenset({*kept, ("replica", name)})] = value
    assert samples(text) == expected
    headers = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headers) == len(set(headers))
    assert {line.split()[2] for line in headers} >= {"ready", "requests_total", "wait_seconds", "peanut_replica_up"}


def test_types_and_help_are_those_of_the_replicas() -> None:
    text = joined([labelled(page(1), "a")], {"a": True})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    own = {family.name: family for family in text_string_to_metric_families(page(1))}
    assert {name: (one.type, one.documentation) for name, one in families.items() if name in own} == {
        name: (one.type, one.documentation) for name, one in own.items()
    }


def test_lost_replicas_are_down(caplog: pytest.LogCaptureFixture) -> None:
    found = samples(joined([labelled(page(1), "a")], {"a": True, "b": False}))
    assert found["peanut_replica_up", frozenset({("replica", "b")})] == 0.0
    assert samples(joined([], {})) == {}


def test_a_metric_of_two_types_is_that_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    gauge = "# HELP x x\n# TYPE x gauge\nx 1\n"
    untyped = "# HELP x x\n# TYPE x untyped\nx 2\n"
    found = samples(joined([labelled(gauge, "a"), labelled(untyped, "b")], {}))
    assert found == {("x", frozenset({("replica", "a")})): 1.0}
    assert "different types of the metric x" in caplog.text


def test_what_is_no_page_of_metrics() -> None:
    with pytest.raises(ValueError):
        labelled("{not metrics", "a")
