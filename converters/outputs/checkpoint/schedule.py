"""Which jobs write the drafts of a run: one for each tensor of the base, one for each file that is copied whole."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters.evaluation.pool import Job
from converters.files.header import TensorInfo
from converters.models.checkpoint import Checkpoint
from converters.outputs.checkpoint.draft import Draft
from converters.outputs.checkpoint.jobs import FileJob, Output, SavedJob, TakeOverJob, TensorJob
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan

# an unchanged shard: (output name, base tensor) of each tensor in it
_Content = tuple[tuple[str, str], ...]


@dataclass
class JobPlan:
    """The jobs of a run, in the order they have to be done.

    Attributes:
        of_file: file of the base -> jobs that read it, in the order of its tensors.
        without_source: jobs that read no base.
        links: copies of, or links to, files that other jobs wrote.
        take_over: to be done first: they take over what an earlier run has written.
    """

    of_file: dict[Path, list[Job]] = field(default_factory=dict)
    without_source: list[Job] = field(default_factory=list)
    links: list[Job] = field(default_factory=list)
    take_over: list[Job] = field(default_factory=list)


def plan_jobs(drafts: Sequence[Draft], share: bool, verify: bool) -> JobPlan:
    """The jobs that write the weights of all drafts; the drafts have the same base."""
    base = drafts[0].plan.base
    planned = JobPlan(of_file={info.file: [] for info in base.tensors.values()})
    made: dict[str, list[Output]] = {}  # base tensor -> what is made from it
    written: dict[_Content, list[TensorInfo]] = {}
    outputs: list[Output] = []
    for draft in drafts:
        for shard, tensors in draft.plan.shards.items():
            content = _content(tensors)
            whole = _base_file(base, tensors) if content is not None else None
            if whole is not None:
                job = _file_job(draft, shard, tensors, whole, share, verify)
                planned.of_file[whole[0].file].append(job)
                outputs += job.outputs
            elif share and content is not None and content in written:
                job = _file_job(draft, shard, tensors, written[content], share, verify)
                planned.links.append(job)
                outputs += job.outputs
            else:
                opened = _open_shard(draft, shard, tensors)
                outputs += opened
                if content is not None:
                    written[content] = [output.place for output in opened]
                for output in opened:
                    if output.tensor.source is None:
                        planned.without_source.append(SavedJob(output, verify))
                    else:
                        made.setdefault(output.tensor.source.name, []).append(output)
    for name, info in base.tensors.items():
        if name in made:
            planned.of_file[info.file].append(TensorJob(info, made[name], verify))
    planned.take_over += [TakeOverJob(output, verify) for output in outputs if output.was_written]
    return planned


def written_sizes(plans: Iterable[Plan], share: bool) -> list[int]:
    """Bytes that each of several plans on one base will write; with `share`, identical files count once."""
    sizes, seen = [], set[_Content]()
    for plan in plans:
        contents = [(_content(tensors), sum(tensor.nbytes for tensor in tensors)) for tensors in plan.shards.values()]
        sizes.append(sum(size for content, size in contents if not share or content is None or content not in seen))
        seen.update(content for content, _ in contents if content is not None)
    return sizes


def _open_shard(draft: Draft, shard: str, tensors: Sequence[TensorPlan]) -> list[Output]:
    places = draft.open_shard(shard).places
    return [Output(draft, shard, tensor, places[tensor.name]) for tensor in tensors]


def _content(tensors: Sequence[TensorPlan]) -> _Content | None:
    """What an unchanged shard consists of; None for one with changes."""
    if not all(tensor.is_copy for tensor in tensors):
        return None
    return tuple((tensor.name, tensor.source.name) for tensor in tensors if tensor.source is not None)


def _base_file(base: Checkpoint, tensors: Sequence[TensorPlan]) -> list[TensorInfo] | None:
    """The tensors of the file of the base that an unchanged shard is, if it is one."""
    if base.original is not None:
        return None  # its tensors are not all, or not under their names, in the files
    file = tensors[0].source.file if tensors[0].source is not None else None
    whole = [info for info in base.tensors.values() if info.file == file]
    same = [(tensor.name, tensor.source) for tensor in tensors] == [(info.name, info) for info in whole]
    return whole if same and base.metadata.get("format") == "pt" else None


def _file_job(
    draft: Draft, shard: str, tensors: Sequence[TensorPlan], whole: list[TensorInfo], share: bool, verify: bool
) -> FileJob:
    places = FileJob.places(whole, draft.folder / shard)
    outputs = [Output(draft, shard, tensor, place) for tensor, place in zip(tensors, places, strict=True)]
    return FileJob(whole[0], whole, outputs, share, verify)
