"""What `peanut_serve` uses of `converters`: the public names, the errors, `converters.serving`, and shared rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

import converters
import converters.serving

# modules of converters that peanut_serve may import
SURFACE = {
    "converters",  # its public names
    "converters.errors",
    "converters.serving",
    # preprocessing and sessions of ONNX models: the exporter and the classifier server share them
    "converters.inference.adapter_file",
    "converters.inference.audio",
    "converters.inference.examples",
    "converters.inference.images",
    "converters.inference.kinds",
    "converters.inference.preprocessing",
    "converters.inference.session",
    "converters.inference.sounds",
    "converters.inference.texts",
    # options and output that all commands have in common
    "converters.cli.console",
    "converters.cli.console_adapters",
    "converters.cli.flags",
    "converters.cli.numbers",
    "converters.cli.options",
}


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of every import from converters; the name is empty for `import module`."""
    for file in sorted((ROOT / "peanut_serve").rglob("*.py")):
        where = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = [(str(node.module), alias.name) for alias in node.names]
            else:
                continue
            yield from ((where, module, name) for module, name in found if module.split(".")[0] == "converters")


def resolved() -> Iterator[tuple[str, str, str]]:
    """The same, with `from converters.cli import console` as an import of that module."""
    for where, module, name in imports():
        is_module = Path(ROOT, *module.split("."), f"{name}.py").is_file()
        yield (where, f"{module}.{name}", "") if is_module else (where, module, name)


def test_peanut_serve_imports_the_surface_and_nothing_else() -> None:
    found = list(resolved())
    assert [one for one in found if one[1] not in SURFACE] == []
    assert {module for _, module, _ in found} == SURFACE, "SURFACE lists modules that are not used any more"
    public = {name for _, module, name in found if module == "converters"}
    assert public <= set(converters.__all__)


def test_every_name_of_the_serving_surface_is_used() -> None:
    used = {name for _, module, name in resolved() if module == "converters.serving"}
    assert used == set(converters.serving.__all__) == set(converters.serving._HOME)


@pytest.mark.parametrize("name", converters.serving.__all__)
def test_every_name_of_the_serving_surface_resolves(name: str) -> None:
    assert getattr(converters.serving, name) is not None


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'converters.serving' has no attribute 'merge_all'"):
        _ = converters.serving.merge_all


def test_type_checkers_and_the_interpreter_find_the_same_names() -> None:
    """The names are written down twice: as imports for type checkers, and as the homes they are loaded from."""
    tree = ast.parse(Path(converters.serving.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: str(node.module).removeprefix("converters.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == converters.serving._HOME


def test_importing_the_surface_imports_nothing_heavy() -> None:
    code = (
        "import sys, converters.serving; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
