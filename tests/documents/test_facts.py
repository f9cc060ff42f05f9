"""What the documents say of the code is so: sizes, links, tables, the map, names of functions and files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase
from support.onnx_zoo.record import models_table, read_record
from support.paths import ROOT
from support.project.documents import ALL, CONTRIBUTING, CONVERTERS, README, SECURITY, SERVING, Document, rows
from support.project.methods_table import methods_table
from support.project.rooms import ORDER

import converters
from converters.adapters.layouts.names import LAYOUT_SUMMARIES
from converters.inference.media_models import MEDIA_MODELS
from converters.inference.text_models import TEXT_MODELS
from peanut_serve.settings import environment
from peanut_serve.swapping import metrics
from peanut_serve.swapping.metrics import StateCollector
from peanut_serve.tenants.usage import REFUSED, USAGE
from peanut_serve.tenants.watched import KEYS_CURRENT
from peanut_serve.web.routes import _ACCESS, Access

WINGS = ("converters", "peanut_serve")


def test_the_readme_is_short() -> None:
    assert README.path.stat().st_size <= 9216


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_the_links_lead_somewhere(document: Document) -> None:
    for link in document.links:
        path, _, anchor = link.partition("#")
        target = (document.path.parent / path).resolve() if path else document.path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in Document(str(target.relative_to(ROOT))).anchors, link


def test_the_readme_leads_to_every_document() -> None:
    assert set(README.links) >= {
        "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "converters/README.md", "peanut_serve/README.md",
        "benchmarks/README.md",
    }  # fmt: skip


def test_every_layout_stands_in_the_table() -> None:
    table = CONVERTERS.section("Adapter layouts").split("`peanut-inspect` shows")[0]
    told = {"hf-peft": "peft_type: PEANUT", "authors-vision": "authors' vision code", "authors-glue": "GLUE code"}
    told |= {"peanut": "peanut_config.json", "lora": "PEFT's LoRA", "red": "authors of RED"}
    for layout in LAYOUT_SUMMARIES:
        assert told.get(layout, layout) in table


def test_the_table_of_methods_is_what_the_methods_say() -> None:
    table = CONVERTERS.section("Adapter methods").split("\n\n")
    assert "\n".join(methods_table()) in table


def test_the_table_of_onnx_models_is_what_a_run_found() -> None:
    table = CONVERTERS.section("ONNX models").split("\n\n")
    assert "\n".join(models_table()) in table
    found = read_record()
    assert {entry["model_type"] for entry in found.values()} >= {*TEXT_MODELS, *MEDIA_MODELS}
    assert all(difference <= 1e-4 for entry in found.values() for difference in entry["differences"].values())


def test_the_public_names_exist() -> None:
    table = rows(CONVERTERS.section("Python API"))
    named = {name for row in table for cell in row for name in re.findall(r"`([A-Za-z_]+)`", cell)}
    assert {"merge", "export_onnx", "load_adapter"} <= named
    assert named <= set(converters.__all__)


def test_every_metric_stands_in_the_table() -> None:
    table = {row[0].strip("`") for row in rows(SERVING.section("Metrics and health"))}
    defined = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase | StateCollector)]
    defined += [USAGE, REFUSED, KEYS_CURRENT]
    found = [one for metric in defined for one in metric.collect()]
    assert table == {f"{one.name}_total" if one.type == "counter" else one.name for one in found}


def test_every_variable_stands_in_the_table() -> None:
    table = {row[0].strip("`") for row in rows(SERVING.section("vLLM without peanut-serve"))}
    assert table == {value for value in vars(environment).values() if str(value).startswith("PEANUT_")}


def packages(wing: str) -> set[str]:
    """Every package of a wing, `adapters/layouts/`, and every module beside them."""
    root = ROOT / wing
    inside = {f"{file.parent.relative_to(root)}/" for file in root.rglob("__init__.py") if file.parent != root}
    return inside | {file.name for file in root.glob("*.py") if file.name != "__init__.py"}


@pytest.mark.parametrize("wing", WINGS)
def test_the_map_names_every_room_in_order(wing: str) -> None:
    table = CONTRIBUTING.section("The map").split(f"`{wing}/`:")[1].split("\n\n")[1]
    listed = [row[0].strip("`") for row in rows(table)]
    assert set(listed) == packages(wing)
    assert len(listed) == len(set(listed))
    rooms = [room.removesuffix(".py").removesuffix("/") for room in listed]
    assert [room for room in rooms if "/" not in room] == list(ORDER[wing])
    for room in rooms:  # a part stands under its room
        assert "/" not in room or any(above == room.rpartition("/")[0] for above in rooms[: rooms.index(room)])


@pytest.mark.parametrize("document", [CONTRIBUTING, CONVERTERS, SERVING, SECURITY], ids=lambda one: one.name)
def test_the_files_that_are_named_exist(document: Document) -> None:
    for path in document.inline:
        if re.fullmatch(r"(converters|peanut_serve|tests|examples|benchmarks|\.ci)/[\w./-]*", path):
            assert (ROOT / path).exists(), path


def test_the_functions_that_are_named_exist() -> None:
    """In the lives and the recipes of CONTRIBUTING.md."""
    source = "\n".join(file.read_text() for wing in WINGS for file in (ROOT / wing).rglob("*.py"))
    headings = ("The life of a merge", "The life of a request", "The life of a swap", "Add a method", "Add a format")
    text = "".join(CONTRIBUTING.section(heading) for heading in headings)
    named = set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\([^`]*\))?`", text))
    code = {name for name in named if re.search(r"[A-Z_.]", name)} - {"None", "W0", "peft_type", "LoRARequest"}
    assert len(code) >= 30
    for name in code:
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b|^ *{part}(: | = )", source, re.MULTILINE), name


@pytest.mark.vllm
def test_the_routes_without_a_key_are_all_named() -> None:
    """Those that the middleware opens, and the prefixes that vLLM's own check covers. Imports vLLM."""
    script = "from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX; print(*GUARDED_PREFIX)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path("/"), timeout=120)
    assert done.returncode == 0, done.stderr
    section = SECURITY.section("What `--api-key` does not cover")
    named = {path for row in rows(section) for path in re.findall(r"`(/[\w/-]*(?:\.json)?)`", row[0])}
    assert named == {path.rstrip("/") for path, access in _ACCESS.items() if access is Access.OPEN}
    assert set(done.stdout.split()) <= set(re.findall(r"`(/[\w]+)`", section))
