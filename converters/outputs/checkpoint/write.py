"""Carrying out merges: every tensor of the base is read once for all outputs; nothing holds the model."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.adapters.base_record import check_base
from converters.errors import CheckpointError, NonFiniteError, VerificationError
from converters.evaluation.pool import Pipeline
from converters.evaluation.verify import Verification
from converters.evaluation.worker import find_devices
from converters.files.staging import check_output, check_space
from converters.models.checkpoint import sample_digests
from converters.outputs.base import Advance, WriteOptions
from converters.outputs.checkpoint.draft import Draft
from converters.outputs.checkpoint.recheck import is_finished
from converters.outputs.checkpoint.schedule import JobPlan, plan_jobs, written_sizes
from converters.outputs.publishing import publishing
from converters.plans.merge import Plan


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: the folder.
        plan: what was done to each tensor.
        verification: None if it was turned off.
        seconds: wall time of writing and verifying all outputs that were written together.
        taken_over: number of tensors that an earlier run had written.
    """

    output: Path
    plan: Plan
    verification: Verification | None
    seconds: float
    taken_over: int = 0


@dataclass(frozen=True, eq=False)
class CheckpointsPlan:
    """Merged checkpoints of one base that can be written.

    Attributes:
        outputs: output folder -> plan.
        todo: those of them that are to be written; with `resume`, an output that is finished is not.
        devices: where f is evaluated.
    """

    outputs: Mapping[Path, Plan]
    todo: Mapping[Path, Plan]
    devices: Sequence[torch.device]


def plan_checkpoints(outputs: Mapping[Path, Plan], options: WriteOptions) -> CheckpointsPlan:
    """Refuse everything about outputs, folder -> plan, that can be refused before they are written.

    Raises:
        OptionError: the device is unknown, or not there.
        OutputError: an output exists, contains an input, or does not fit on the disk.
    """
    devices = find_devices(options.device)
    todo = {output: plan for output, plan in outputs.items() if not (options.resume and is_finished(output, plan))}
    inputs = {weighted.adapter.path for plan in todo.values() for weighted in plan.adapters}
    inputs |= {plan.base.folder for plan in todo.values()}
    for output in todo:
        check_output(output, options.overwrite, inputs)
    sizes = dict(zip(todo, written_sizes(todo.values(), options.share), strict=True))
    streams = [plan.base.stream for plan in todo.values() if plan.base.stream is not None]
    check_space({**sizes, **{stream.folder: stream.most_bytes for stream in streams}})
    return CheckpointsPlan(outputs, todo, devices)


def run_merge(
    plan: Plan,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    share: bool = False,
    resume: bool = False,
    advance: Advance = lambda size: None,
) -> MergeResult:
    """Carry out a plan; see `converters.merge`. `advance` is called with bytes written and bytes verified.

    Raises `PeanutError` of some kind; whichever it is, no output was written or changed.
    """
    options = WriteOptions(device, overwrite, verify, share, resume)
    outputs = {plan.default_output if output is None else Path(output): plan}
    return write_checkpoints(plan_checkpoints(outputs, options), options, advance)[0]


def write_checkpoints(
    planned: CheckpointsPlan, options: WriteOptions, advance: Advance = lambda size: None
) -> list[MergeResult]:
    """Write planned checkpoints together; returns a result for each output, also for those that were finished.

    Raises:
        NonFiniteError: a merged weight is not finite, or does not fit the dtype.
        VerificationError: what was written is not what was computed.
        OutputError: a file could not be written. Whichever error it is, no existing output was changed.
    """
    results = {
        output: MergeResult(output, plan, None, 0.0, len(plan.tensors)) for output, plan in planned.outputs.items()
    }
    if planned.todo:
        start = time.perf_counter()
        with publishing({output: [plan] for output, plan in planned.todo.items()}, options) as folders:
            drafts, verifications = _write_drafts(planned, folders, options, advance)
        seconds = time.perf_counter() - start
        for output, draft, verification in zip(planned.todo, drafts, verifications, strict=True):
            results[output] = MergeResult(output, draft.plan, verification, seconds, draft.taken_over)
    return list(results.values())


def _write_drafts(
    planned: CheckpointsPlan, folders: Mapping[Path, Path], options: WriteOptions, advance: Advance
) -> tuple[list[Draft], list[Verification | None]]:
    """Write the outputs into their staging folders."""
    with ExitStack() as stack:
        drafts = [stack.enter_context(Draft(plan, folders[output], advance)) for output, plan in planned.todo.items()]
        with _naming_removed_folders(drafts):
            _write_weights(drafts, Pipeline(planned.devices), options)
            _check_streamed_base(planned.todo.values())
            return drafts, [draft.finish(options.verify) for draft in drafts]


@contextmanager
def _naming_removed_folders(drafts: Sequence[Draft]) -> Iterator[None]:
    """If a staging folder was removed meanwhile, report that instead of the error it caused."""
    try:
        yield
    except (OSError, CheckpointError):
        removed = next((draft.folder for draft in drafts if not draft.folder.is_dir()), None)
        if removed is None:
            raise
        raise OSError(f"{removed} was removed while it was being written") from None


def _write_weights(drafts: Sequence[Draft], pipeline: Pipeline, options: WriteOptions) -> None:
    base = drafts[0].plan.base
    planned = plan_jobs(drafts, options.share, options.verify)
    try:
        pipeline.run(planned.take_over)
        with closing(_base_files(planned, drafts, options.resume)) as files:
            for file in files:
                pipeline.run(planned.of_file[file])
        pipeline.run(planned.without_source)
        pipeline.run(planned.links)
    except (NonFiniteError, VerificationError):
        base.check_unchanged()  # if it changed, that is why
        raise


def _base_files(planned: JobPlan, drafts: Sequence[Draft], resume: bool) -> Generator[Path]:
    """The files of the base in turn; of a streamed base only those that a job still has to read, or to sample."""
    base = drafts[0].plan.base
    if base.stream is None:
        yield from planned.of_file
        return
    for draft in drafts:
        base.samples.update(draft.journal.samples)
    infos = {file: [info for info in base.tensors.values() if info.file == file] for file in planned.of_file}
    wanted = [
        file
        for file, jobs in planned.of_file.items()
        if not all(job.is_finished for job in jobs) or any(info.name not in base.samples for info in infos[file])
    ]
    with closing(base.stream.fetch(wanted, keep=resume)) as fetched:
        for file in fetched:
            samples = sample_digests(infos[file])
            base.samples.update(samples)
            for draft in drafts:
                draft.journal.record_samples(samples)
            yield file


def _check_streamed_base(plans: Iterable[Plan]) -> None:
    """Compare a streamed base with the adapters, now that its fingerprint is known."""
    for plan in plans:
        if plan.base.stream is not None:
            for weighted in plan.adapters:
                check_base(plan.base, weighted.adapter, plan.options["force_base"])
