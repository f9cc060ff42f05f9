"""The project's own source, read as text: which module imports what, also inside functions and for types only."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.paths import ROOT

WINGS = ("converters", "peanut_serve")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file, by the name it is imported with."""

    name: str
    file: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.file.read_text())

    @property
    def imports(self) -> Iterator[str]:
        """Dotted names: of modules, or of what is taken out of one."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{self.name}: a relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    @property
    def functions(self) -> Iterator[tuple[str, Function]]:
        """(dotted name, definition), those inside classes and functions too."""
        pending: list[tuple[str, ast.AST]] = [(self.name, self.tree)]
        while pending:
            prefix, parent = pending.pop()
            for node in ast.iter_child_nodes(parent):
                name = f"{prefix}.{node.name}" if isinstance(node, Function | ast.ClassDef) else prefix
                if isinstance(node, Function):
                    yield name, node
                pending.append((name, node))


def _module(file: Path) -> Module:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), file)


def modules() -> dict[str, Module]:
    """Every module of both packages."""
    found = [_module(file) for wing in WINGS for file in sorted((ROOT / wing).rglob("*.py"))]
    return {module.name: module for module in found}


def own_imports(module: Module, known: dict[str, Module]) -> set[str]:
    """The project's modules that a module names."""
    named = {name if name in known else name.rpartition(".")[0] for name in module.imports}
    return {name for name in named if name in known}


def is_within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def size(function: Function) -> int:
    """Lines of a function, with its signature and its docstring."""
    return (function.end_lineno or 0) - function.lineno + 1


def body_size(function: Function) -> int:
    """Lines from the first statement on."""
    return (function.end_lineno or 0) - function.body[0].lineno + 1


def parameters(function: Function) -> list[str]:
    """Names; `self` and `cls` are none."""
    named = function.args
    found = [*named.posonlyargs, *named.args, *named.kwonlyargs]
    return [found_one.arg for found_one in found if found_one.arg not in ("self", "cls")]
