"""The seam of the formats: what a format of output does, what it is given, and what it gives back.

`table.py` lists the formats. Nothing here imports torch, so that a command can look at its options first.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from converters.adapters.adapter import Weighted
    from converters.models.checkpoint import Checkpoint
    from converters.plans.merge import Plan

# called with the number of bytes that were done since the last call
Advance = Callable[[int], None]
# called with the name of each step as it begins
Report = Callable[[str], None]
# opens a base and adapters: they are opened only by a format that can be recomputed from them
OpenInputs = Callable[[], "tuple[Checkpoint, Sequence[Weighted]]"]

PlanT = TypeVar("PlanT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class WriteOptions:
    """How outputs are written; see `converters.merge`.

    Attributes:
        device: where f is evaluated: `auto`, `cpu`, `cuda`, `cuda:N`.
        overwrite: replace an earlier output.
        verify: check the written files before they are published.
        share: link to files that no adapter changes, instead of copying them.
        resume: continue an interrupted run of the same merge, and keep what this run wrote if it fails.
    """

    device: str = "auto"
    overwrite: bool = False
    verify: bool = True
    share: bool = False
    resume: bool = False


@dataclass(frozen=True)
class OutputRequest:
    """What is to be written where.

    Attributes:
        output: the folder to write, or the folder of the outputs; None for the format's default.
        each: every plan is an output of its own.
        write: how it is written.
        own: options that only some formats take, name -> value; without those that were not given.
    """

    output: Path | None = None
    each: bool = False
    write: WriteOptions = field(default_factory=WriteOptions)
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """What a command prints.

    Attributes:
        facts: with `--json`.
        lines: without.
    """

    facts: dict[str, Any] | list[dict[str, Any]]
    lines: tuple[str, ...]


class Progress(Protocol):
    """Where a format reports how far it is."""

    def bar(self, what: str, total: int) -> AbstractContextManager[Advance]:
        """A progress bar for `total` bytes."""

    def steps(self) -> AbstractContextManager[Report]:
        """The name of the step that is under way."""


class Format(Protocol[PlanT, ResultT]):
    """A format of output. `name` is what `--format` and the manifest call it."""

    name: str

    def plan(self, plans: "Sequence[Plan]", request: OutputRequest) -> PlanT:
        """Refuse everything that can be refused before anything is written.

        Raises:
            ConversionError: the adapter cannot be expressed in this format.
            OptionError: an option does not apply.
            OutputError: the output exists, or there is no room for it.
        """

    def folders(self, planned: PlanT) -> Sequence[Path]:
        """The folders that will be written."""

    def write(self, planned: PlanT, options: WriteOptions, progress: Progress) -> ResultT:
        """Write the output and check it. Whichever error is raised, no output was written or changed."""

    def show(self, planned: PlanT, result: ResultT | None) -> Shown:
        """What was written; what would be written if there is no result."""

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare a written folder with its manifest; with `full`, with what base and adapters give, too.

        Raises:
            CheckpointError: the folder is damaged, so that it cannot be compared.
            OptionError: `full` was given, and this format cannot be recomputed.
            VerificationError: a file is missing or changed; the message names it.
        """
