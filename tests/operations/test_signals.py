"""The dashboard and the alert rules ask for metrics and labels that a server has."""

import inspect
import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import vllm.v1.metrics.loggers
import yaml
from prometheus_client.metrics import MetricWrapperBase
from support.paths import ROOT
from support.project.documents import Document

from peanut_serve.swapping import metrics
from peanut_serve.tenants.usage import REFUSED, USAGE
from peanut_serve.tenants.watched import KEYS_CURRENT
from peanut_serve.web import exchange

pytestmark = pytest.mark.slow  # imports vLLM

OPERATIONS = ROOT / "examples" / "operations"
DASHBOARD = json.loads((OPERATIONS / "dashboard.json").read_text())
(GROUP,) = yaml.safe_load((OPERATIONS / "alerts.yaml").read_text())["groups"]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OF_THE_SCRAPE = {"job", "instance", "le", "__name__"}


def ours() -> dict[str, set[str]]:
    """Series -> labels of the metrics of this package."""
    defined = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    defined += [REFUSED, KEYS_CURRENT]
    found = {
        f"{metric._name}{suffix}": set(metric._labelnames) for metric in defined for suffix in SUFFIXES[metric._type]
    }
    return found | {f"{family.name}_total": {"variant", "tenant"} for family in USAGE.collect()}


def vllms() -> set[str]:
    """Series that vLLM may have, by its source."""
    names = set(re.findall(r'"(vllm:\w+)"', inspect.getsource(vllm.v1.metrics.loggers)))
    return {
        f"{name.removesuffix('_total')}{suffix}" for name in names for group in SUFFIXES.values() for suffix in group
    }


def expressions() -> Iterator[tuple[str, str]]:
    """(where, query), with Grafana's variables filled in."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "5m").replace("$job", "j").replace("$instance", "i")
            yield panel["title"], text
    for rule in GROUP["rules"]:
        yield rule["alert"], rule["expr"]


def selectors(query: object) -> Iterator[promql_parser.VectorSelector]:
    """The selectors in a parsed query."""
    if isinstance(query, promql_parser.VectorSelector):
        yield query
        return
    for name in ("vector_selector", "expr", "lhs", "rhs", "args", "param"):
        inner = getattr(query, name, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None and not isinstance(one, str):
                yield from selectors(one)


def asked() -> list[tuple[str, str, set[str]]]:
    """(where, series, labels that its selector names)."""
    found = [(where, one) for where, text in expressions() for one in selectors(promql_parser.parse(text))]
    return [(where, one.name, {matcher.name for matcher in one.matchers.matchers}) for where, one in found]


def test_every_query_is_promql_and_asks_for_something() -> None:
    queries = list(expressions())
    assert len(queries) > 25
    assert {where for where, _, _ in asked()} == {where for where, _ in queries}


def test_every_series_exists() -> None:
    known = ours().keys() | vllms() | {"up"}
    assert [(where, name) for where, name, _ in asked() if name not in known] == []
    assert {name for _, name, _ in asked()} & vllms()


def test_every_metric_of_the_package_is_shown() -> None:
    shown = {name for _, name, _ in asked()}
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            assert {f"{value._name}{suffix}" for suffix in SUFFIXES[value._type]} & shown, value._name


def test_every_label_exists() -> None:
    labels = ours()
    assert [
        (where, name, wrong)
        for where, name, named in asked()
        if name in labels and (wrong := named - labels[name] - OF_THE_SCRAPE)
    ] == []
    for where, text in expressions():
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(",")}
        known = set().union(*(labels.get(name, set()) for found, name, _ in asked() if found == where))
        assert grouped <= known | OF_THE_SCRAPE, where


def test_the_legend_names_labels_of_the_query() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
                assert label in ("instance", *(part.strip() for group in grouped for part in group.split(",")))


def test_outcomes_of_the_rules_are_those_of_the_code() -> None:
    source = inspect.getsource(exchange)
    found = {value for _, text in expressions() for value in re.findall(r'outcome=~?"([^"]+)"', text)}
    outcomes = {one for value in found for one in value.split("|")}
    assert "5.." in outcomes  # a status
    for outcome in outcomes - {"5.."}:
        assert f'"{outcome}"' in source, outcome


def test_the_dashboard_is_laid_out() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_every_alert_leads_to_the_run_book() -> None:
    anchors = Document("peanut_serve/OPERATIONS.md").anchors
    for rule in GROUP["rules"]:
        assert rule["annotations"]["runbook"] in anchors, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
