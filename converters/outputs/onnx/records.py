"""The files beside the graphs: config, tokenizer or preprocessor, the manifest, a model card."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import OptionError
from converters.files.hashing import hash_file
from converters.files.json_files import write_json
from converters.files.names import MANIFEST_NAME
from converters.models import config as model_config
from converters.models.companions.companion import Companion, Companions
from converters.outputs.manifest import provenance
from converters.outputs.onnx.card import build_onnx_card
from converters.outputs.onnx.checks import TaskCheck
from converters.outputs.onnx.graphs.merged import BASE_DATA
from converters.outputs.onnx.kind import kind_of
from converters.outputs.onnx.options import ExportOptions, Form
from converters.outputs.onnx.task_files import TaskFiles
from converters.plans.merge import Plan

_CONFIG = "config.json"
_WEIGHTS_PATTERNS = ("*.onnx", "*.onnx_data", "*.onnx_adapter", "onnx/*.onnx", "onnx/*.onnx_data")


def shared_companions(plans: Sequence[Plan]) -> Companions:
    """Tokenizer or preprocessor of the tasks in one folder.

    Raises `OptionError` when the tasks have different ones.
    """
    shared: dict[str, Companion] = {}
    for plan in plans:
        for name, one in plan.companions.files.items():
            known = shared.setdefault(name, one)
            if known.read() != one.read():
                raise OptionError(
                    f"{known.source} and {one.source} differ, but tasks in one folder share one {name}; export them "
                    "separately"
                )
    return replace(plans[0].companions, files=shared)


def write_records(
    folder: Path,
    plans: Sequence[Plan],
    files: Sequence[TaskFiles],
    checks: Sequence[TaskCheck],
    options: ExportOptions,
) -> None:
    """Write configs, manifest and card, when everything else is in the folder."""
    hashes = {
        path.relative_to(folder).as_posix(): hash_file(path)
        for pattern in _WEIGHTS_PATTERNS
        for path in sorted(folder.glob(pattern))
    }
    single = options.form is Form.MERGED
    tasks = {}
    for plan, written, check in zip(plans, files, checks, strict=True):
        config = _CONFIG if single else f"{written.task}.{_CONFIG}"
        facts = {**plan.config, "peanut": _for_the_loader(plan, written, options.form, hashes)}
        if options.transformersjs:
            facts["transformers.js_config"] = _for_transformers_js(written, hashes)
        write_json(folder / config, facts)
        tasks[written.task] = {"config": config, **_facts(plan, written, check)}
    if not single:
        write_json(folder / _CONFIG, dict(plans[0].base.config))
    manifest = {
        **provenance(plans[0], plans[0].base.fingerprint),
        "adapters": [entry for plan in plans for entry in provenance(plan, plan.base.fingerprint)["adapters"]],
        "format": "onnx",
        "form": options.form.value,
        "opset": options.opset,
        "tasks": tasks,
        "files": hashes,
        "companions": shared_companions(plans).facts(),
    }
    manifest["versions"] |= {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    write_json(folder / MANIFEST_NAME, manifest)
    (folder / "README.md").write_text(build_onnx_card(plans, files, checks, options), encoding="utf-8")


def _for_the_loader(plan: Plan, written: TaskFiles, form: Form, hashes: dict[str, str]) -> dict[str, Any]:
    """What `peanut_serve.classify` compares the files of a task with."""
    # a swappable graph does not belong to one task: another graph with its inputs works as well
    own = {written.adapter} if written.adapter else {*written.models.values(), BASE_DATA}
    return {
        "base": plan.base.fingerprint,
        "kind": kind_of(plan).record(),
        "form": form.value,
        "models": dict(written.models),
        "adapter": written.adapter,
        "files": {name: digest for name, digest in hashes.items() if {name, name.removesuffix("_data")} & own},
    }


def _for_transformers_js(written: TaskFiles, hashes: dict[str, str]) -> dict[str, Any]:
    """What transformers.js loads by default (its `src/utils/dtypes.js` and `model-loader.js`).

    In browsers that is int8, whether it exists or not; and external weights only if the config announces them.
    """
    beside = {Path(model).name: 1 for model in written.models.values() if f"{model}_data" in hashes}
    return {
        **({} if "int8" in written.models else {"dtype": "fp32"}),
        **({"use_external_data_format": beside} if beside else {}),
    }


def _facts(plan: Plan, written: TaskFiles, check: TaskCheck) -> dict[str, Any]:
    """The part of the manifest about one task."""
    return {
        "labels": model_config.labels_of(plan.config),
        "adapters": [weighted.adapter.digest for weighted in plan.adapters],
        "models": dict(written.models),
        "adapter": written.adapter,
        "quantized": {precision: one.summary() for precision, one in written.quantized.items()},
        **check.summary(),
    }
