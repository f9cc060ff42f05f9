"""The plan of the source, and what holds it: the order of the rooms, who may import what, and how large a thing gets.

The order is in `support/project/rooms.py`: a room imports only rooms above it in its list.
"""

import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import setuptools
from setuptools.config.pyprojecttoml import read_configuration
from support.paths import ROOT
from support.project.rooms import ORDER
from support.project.source_tree import (
    WINGS,
    Module,
    body_size,
    is_within,
    modules,
    own_imports,
    parameters,
    size,
)

# inside a room: (part, what it never imports)
INSIDE = (
    ("converters.adapters.layouts", "converters.adapters.loading"),
    ("converters.adapters.layouts", "converters.adapters.opening"),
    ("converters.adapters.layouts", "converters.adapters.finding"),
    ("converters.outputs.checkpoint", "converters.outputs.lora"),
    ("converters.outputs.checkpoint", "converters.outputs.peft"),
    ("converters.outputs.checkpoint", "converters.outputs.onnx"),
    ("converters.outputs.onnx", "converters.outputs.checkpoint"),
    ("converters.outputs.onnx", "converters.outputs.lora"),
    ("converters.outputs.onnx", "converters.outputs.peft"),
    *(("converters.outputs.onnx.graphs", f"converters.outputs.onnx.{name}") for name in (
        "card", "checks", "eval_data", "opset", "parity", "plan", "records", "task_files", "write"
    )),
    ("peanut_serve.vllm_plugin.lora", "peanut_serve.vllm_plugin.swap"),
    ("peanut_serve.vllm_plugin.swap", "peanut_serve.vllm_plugin.lora"),
)  # fmt: skip

# package -> where it may be imported; one that is not here, nowhere
EVERYWHERE = ("",)
THIRD_PARTY = {
    "torch": EVERYWHERE,
    "numpy": EVERYWHERE,
    "safetensors": EVERYWHERE,
    "xxhash": EVERYWHERE,
    "huggingface_hub": (
        "converters.hub",
        "converters.models.finding",
        "converters.adapters.finding",
        "converters.outputs.upload",
        "converters.outputs.onnx.graphs.template_cache",  # where caches are
        "converters.cli.merge_command",
        "peanut_serve.settings",
    ),
    "transformers": ("converters.models.architecture", "converters.inference", "converters.outputs.onnx.graphs"),
    "peft": ("converters.methods.dense.waveft",),
    "sklearn": ("converters.methods.spectral.clusters",),
    "onnx": ("converters.outputs.onnx",),
    "onnx_ir": ("converters.outputs.onnx.graphs",),
    "onnxscript": ("converters.outputs.onnx.graphs",),
    "google": ("converters.outputs.onnx.graphs",),  # protobuf's errors
    "onnxruntime": ("converters.inference", "converters.outputs.onnx.graphs"),
    "PIL": ("converters.inference",),
    "matplotlib": ("converters.inspection",),
    "opentelemetry": ("peanut_serve.signals",),
    "typer": ("converters.cli", "peanut_serve.cli"),
    "rich": ("converters.cli", "peanut_serve.cli"),
    "httpx": ("peanut_serve.cli", "peanut_serve.ray"),
    "pydantic": (
        "peanut_serve.settings",
        "peanut_serve.tenants",
        "peanut_serve.variants",
        "peanut_serve.web",
        "peanut_serve.releases",
        "peanut_serve.cli",
        "peanut_serve.ray",
    ),
    "fastapi": (
        "peanut_serve.web",
        "peanut_serve.releases.routes",
        "peanut_serve.classify.http",
        "peanut_serve.vllm_plugin",
        "peanut_serve.ray",
    ),
    "ray": ("peanut_serve.ray",),
    "jinja2": ("peanut_serve.web.console",),
    "starlette": (
        "peanut_serve.web",
        "peanut_serve.classify.http",
        "peanut_serve.vllm_plugin",
        "peanut_serve.ray.visited",
    ),
    "uvicorn": ("peanut_serve.web", "peanut_serve.classify.http", "peanut_serve.vllm_plugin"),
    "yaml": (
        "peanut_serve.tenants.keys",
        "peanut_serve.cli.configuration",
        "peanut_serve.cli.launch",
        "peanut_serve.ray.deploying",
    ),
    "prometheus_client": (
        "peanut_serve.tenants",
        "peanut_serve.swapping",
        "peanut_serve.classify.serving",
        "peanut_serve.ray",
    ),
    "vllm": (
        "peanut_serve.vllm_plugin",
        "peanut_serve.cli.launch",
        "peanut_serve.cli.checking",
        "peanut_serve.lora.offline",
    ),
}

MOST_MODULES, MOST_LINES, MOST_PARAMETERS = 15, 60, 8
# their parameters are the interface: any number, and only their bodies have to be short
PUBLIC = ("converters.api.",)
COMMANDS = (
    "converters.cli.merge_command.run_command",
    "converters.cli.inspect_command.run_command",
    "peanut_serve.cli.main._serve",
    "peanut_serve.cli.predict_command._predict",
    "peanut_serve.cli.classify_command._classify",
    "peanut_serve.cli.deploy_command._deploy",
    "peanut_serve.cli.size_command._size",
    "peanut_serve.cli.key_command._key",
    "peanut_serve.cli.deploy_classifiers.deploy_classifiers",
)

MODULES = modules()
IMPORTS = {name: own_imports(module, MODULES) for name, module in MODULES.items()}


def arrows(importer: str, imported: str) -> list[str]:
    """The imports from one package into another."""
    return [
        f"{name} imports {found}"
        for name, all_found in IMPORTS.items()
        for found in sorted(all_found)
        if is_within(name, importer) and is_within(found, imported)
    ]


@pytest.mark.parametrize("wing", WINGS)
def test_every_room_is_in_the_list(wing: str) -> None:
    rooms = {name.split(".")[1] for name in MODULES if name.startswith(f"{wing}.")}
    assert rooms == set(ORDER[wing])


@pytest.mark.parametrize("wing", WINGS)
def test_a_room_imports_only_rooms_above_it(wing: str) -> None:
    rooms = [f"{wing}.{room}" for room in ORDER[wing]]
    pairs = [(upper, lower) for index, upper in enumerate(rooms) for lower in rooms[index + 1 :]]
    assert [arrow for upper, lower in pairs for arrow in arrows(upper, lower)] == []
    package_itself = [arrow for name in rooms for arrow in arrows(name, wing) if arrow.endswith(f" {wing}")]
    assert package_itself == [], "inside the package, names are imported from where they are"


@pytest.mark.parametrize(("part", "other"), INSIDE)
def test_inside_a_room(part: str, other: str) -> None:
    assert arrows(part, other) == []


def test_converters_stands_without_the_server() -> None:
    assert arrows("converters", "peanut_serve") == []


def test_there_is_no_cycle() -> None:
    graph = {name: found - {name} for name, found in IMPORTS.items() if name not in WINGS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_third_party_packages_stay_in_their_rooms() -> None:
    def is_allowed(module: str, package: str) -> bool:
        return any(not room or is_within(module, room) for room in THIRD_PARTY.get(package, ()))

    def packages(module: Module) -> set[str]:
        return {name.split(".")[0] for name in module.imports} - {*sys.stdlib_module_names, *WINGS}

    found = [(name, package) for name, module in MODULES.items() for package in sorted(packages(module))]
    assert [f"{name} imports {package}" for name, package in found if not is_allowed(name, package)] == []
    assert {package for _, package in found} == set(THIRD_PARTY)


def test_no_folder_is_crowded() -> None:
    counts = {
        str(folder.relative_to(ROOT)): len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
        for top in (*WINGS, "tests")
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    }
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_tests_share_by_support_and_fixtures() -> None:
    """No test module is imported by another, nor is a `conftest`."""
    files = [Module(path.stem, path) for path in (ROOT / "tests").rglob("*.py")]
    found = [f"{module.file} imports {name}" for module in files for name in module.imports]
    assert [arrow for arrow in found if arrow.split()[-1].startswith(("test_", "tests.", "conftest"))] == []


def functions() -> list[tuple[str, int, int]]:
    """(name, lines, parameters) of every function; a public one's parameters are not counted."""
    found = [one for module in MODULES.values() for one in module.functions]
    is_public = lambda name: name.startswith(PUBLIC) or name in COMMANDS  # noqa: E731
    return [
        (name, body_size(function), 0) if is_public(name) else (name, size(function), len(parameters(function)))
        for name, function in found
    ]


def test_functions_are_short() -> None:
    assert {name: lines for name, lines, _ in functions() if lines > MOST_LINES} == {}


def test_functions_have_few_parameters() -> None:
    assert {name: count for name, _, count in functions() if count > MOST_PARAMETERS} == {}


def test_the_exceptions_exist() -> None:
    known = {name for name, _, _ in functions()}
    assert set(COMMANDS) <= known
    named = {*(name for pair in INSIDE for name in pair), *(room for rooms in THIRD_PARTY.values() for room in rooms)}
    assert named - {""} <= set(MODULES)


def test_setuptools_finds_every_package() -> None:
    options = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]["find"]
    folders = {file.parent.relative_to(ROOT) for wing in WINGS for file in (ROOT / wing).rglob("*.py")}
    found = setuptools.find_packages(str(ROOT), **options)
    assert {Path(*name.split(".")) for name in found} == folders
