"""Carrying out merges: every tensor of the base is read once for all outputs; nothing holds the model."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from converters.adapters.base_record import check_base
from converters.errors import CheckpointError, NonFiniteError, OutputError, VerificationError
from converters.evaluation.pool import Pipeline
from converters.evaluation.verify import Verification
from converters.evaluation.worker import find_devices
from converters.files.staging import check_output, check_space, staged
from converters.models.checkpoint import sample_digests
from converters.outputs.checkpoint.draft import Advance, Draft
from converters.outputs.checkpoint.recheck import is_finished
from converters.outputs.checkpoint.schedule import JobPlan, plan_jobs, written_sizes
from converters.plans.merge import Plan


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: the folder.
        plan: what was done to each tensor.
        verification: None if it was turned off.
        seconds: wall time of writing and verifying, of all outputs that were written together.
        taken_over: tensors that an earlier run had written.
    """

    output: Path
    plan: Plan
    verification: Verification | None
    seconds: float
    taken_over: int = 0


def check_merge(
    plans: Mapping[Path, Plan], overwrite: bool, share: bool = False, resume: bool = False
) -> dict[Path, Plan]:
    """Everything that can be refused about outputs; returns those that are to be written.

    With `resume`, an output that is there and whole already is not.

    Raises `OutputError` of one kind or another.
    """
    todo = {output: plan for output, plan in plans.items() if not (resume and is_finished(output, plan))}
    inputs = {weighted.adapter.path for plan in todo.values() for weighted in plan.adapters}
    inputs |= {plan.base.folder for plan in todo.values()}
    for output in todo:
        check_output(output, overwrite, inputs)
    sizes = dict(zip(todo, written_sizes(todo.values(), share), strict=True))
    streams = [plan.base.stream for plan in todo.values() if plan.base.stream is not None]
    check_space({**sizes, **{stream.folder: stream.most_bytes for stream in streams}})
    return todo


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
    """Carry out a plan; see `converters.merge`. `advance` is told of bytes written and of bytes verified."""
    output = Path(output) if output is not None else plan.default_output
    return run_merges(
        {output: plan}, device=device, overwrite=overwrite, verify=verify, share=share, resume=resume, advance=advance
    )[0]


def run_merges(
    plans: Mapping[Path, Plan],
    *,
    device: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    share: bool = False,
    resume: bool = False,
    advance: Advance = lambda size: None,
) -> list[MergeResult]:
    """Carry out plans on one base together, output folder -> plan; see `converters.merge_each`."""
    devices = find_devices(device)
    todo = check_merge(plans, overwrite, share, resume)
    results = {
        output: MergeResult(output, plan, None, 0.0, len(plan.tensors))
        for output, plan in plans.items()
        if output not in todo
    }
    if todo:
        start = time.perf_counter()
        try:
            with ExitStack() as stack:
                drafts = []
                for output, plan in todo.items():
                    folder = stack.enter_context(staged(output, overwrite, keep=resume))
                    drafts.append(stack.enter_context(Draft(plan, folder, advance)))
                with _seeing_removal(drafts):
                    _write_weights(drafts, Pipeline(devices), share, verify, resume)
                    _check_streamed_base(todo.values())
                    verifications = [draft.finish(verify) for draft in drafts]
                _check_inputs_unchanged(todo.values())
        except OSError as error:
            names = ", ".join(map(str, todo))
            raise OutputError(f"{names} could not be written: {error}; it is as it was before") from error
        seconds = time.perf_counter() - start
        for output, draft, verification in zip(todo, drafts, verifications, strict=True):
            results[output] = MergeResult(output, draft.plan, verification, seconds, draft.taken_over)
    return [results[output] for output in plans]


@contextmanager
def _seeing_removal(drafts: Sequence[Draft]) -> Iterator[None]:
    """Where a staging folder was removed meanwhile, say that instead of what came of it."""
    try:
        yield
    except (OSError, CheckpointError):
        gone = next((draft.folder for draft in drafts if not draft.folder.is_dir()), None)
        if gone is None:
            raise
        raise OSError(f"{gone} was removed while it was written") from None


def _write_weights(drafts: Sequence[Draft], pipeline: Pipeline, share: bool, verify: bool, resume: bool) -> None:
    base = drafts[0].plan.base
    planned = plan_jobs(drafts, share, verify)
    try:
        pipeline.run(planned.take_over)
        with closing(_base_files(planned, drafts, resume)) as files:
            for file in files:
                pipeline.run(planned.of_file[file])
        pipeline.run(planned.without_source)
        pipeline.run(planned.links)
    except (NonFiniteError, VerificationError):
        base.check_unchanged()  # if it changed, that is why
        raise


def _base_files(planned: JobPlan, drafts: Sequence[Draft], resume: bool) -> Generator[Path]:
    """The files of the base in turn; of a streamed one only those of which something is not known yet."""
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
    """Now that the fingerprint is known."""
    for plan in plans:
        if plan.base.stream is not None:
            for weighted in plan.adapters:
                check_base(plan.base, weighted.adapter, plan.options["force_base"])


def _check_inputs_unchanged(plans: Iterable[Plan]) -> None:
    for plan in plans:
        plan.base.check_unchanged()
        for weighted in plan.adapters:
            weighted.adapter.store.check_unchanged()
