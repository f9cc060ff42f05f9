"""The project's documents, read as text: their commands, snippets, tables, links and headings."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.paths import ROOT

# names of commands, where a document speaks of them
_NAMES = tuple(f"peanut-serve {one}" for one in ("ctl", "deploy", "predict", "classify", "size", "state"))


@dataclass(frozen=True)
class Document:
    """One Markdown file."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        """Without its code blocks."""
        return re.sub(r"```.*?```", "", self.text, flags=re.DOTALL)

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.DOTALL | re.MULTILINE)

    @property
    def inline(self) -> list[str]:
        """Code in the text."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def commands(self) -> list[str]:
        """The project's own commands in the text, in order and once each."""
        return list(dict.fromkeys(c for c in self.inline if re.match(r"peanut-\S+ ", c) and c not in _NAMES))

    @property
    def shell_commands(self) -> list[str]:
        """What stands in blocks: a `bash` block has a command in each line, a `sh` block is one command."""
        lines = [line for block in self.blocks("bash") for line in block.splitlines()]
        return [*lines, *self.blocks("sh")]

    def section(self, heading: str) -> str:
        """The text under a heading, up to the next of its level."""
        level = re.search(rf"^(#+) {re.escape(heading)}$", self.text, re.MULTILINE)
        assert level is not None, f"{self.name} has no heading {heading}"
        rest = self.text[level.end() :]
        return re.split(rf"^#{{1,{len(level[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]

    @property
    def links(self) -> list[str]:
        """Targets of links that stay in the project."""
        found = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [target for target in found if "://" not in target and not target.startswith("mailto:")]

    @property
    def anchors(self) -> set[str]:
        """As GitHub makes them of headings."""
        headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", self.text, flags=re.DOTALL), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(table: str) -> list[list[str]]:
    """The cells of the rows of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


README = Document("README.md")
CONVERTERS = Document("converters/README.md")
SERVING = Document("peanut_serve/README.md")
OPERATIONS = Document("peanut_serve/OPERATIONS.md")  # its commands run in tests/documents/test_operations.py
CONTRIBUTING = Document("CONTRIBUTING.md")
SECURITY = Document("SECURITY.md")
GATEWAYS = Document("peanut_serve/GATEWAYS.md")

EXECUTED = (README, CONVERTERS, SERVING, CONTRIBUTING)
ALL = (
    *EXECUTED,
    OPERATIONS,
    SECURITY,
    GATEWAYS,
    Document("CHANGELOG.md"),
    Document("benchmarks/README.md"),
    Document("examples/onnx/README.md"),
    Document("tests/data/README.md"),
)
