"""The README.md of a merged model, with the metadata the Hub reads (https://huggingface.co/docs/hub/model-cards)."""

import json
from collections import Counter

from converters.adapters.adapter import Weighted
from converters.adapters.facts import settings_of
from converters.files.names import MANIFEST_NAME
from converters.hub.names import is_hub_id
from converters.models.checkpoint import Checkpoint
from converters.plans.merge import Plan
from converters.plans.trained_base.trained import describe_changes

_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}


def build_model_card(plan: Plan) -> str:
    """Markdown with a YAML header. JSON strings are YAML strings."""
    base = plan.base
    base_id = base_id_of(plan)
    head = ["library_name: transformers", "tags:", "- peanut", "- peft", "- merged"]
    if base_id is not None:
        head = [f"base_model: {json.dumps(base_id)}", "base_model_relation: finetune", *head]
    architecture = str((plan.config.get("architectures") or [""])[0])
    head += [f"pipeline_tag: {tag}" for end, tag in _PIPELINES.items() if architecture.endswith(end)]
    formulas = "; ".join(formulas_of(plan))
    counts = Counter(tensor.action.value for tensor in plan.tensors)
    lines = [
        f"# {base.name} with {plan.name}",
        "",
        f"The weights of {base_id or base.name} with the adapter `{plan.name}` merged into them: {formulas}. "
        "Load it as any other transformers model; no adapter library is needed.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {base_id or base.name}{f' at {base.revision}' if base.revision else ''} |",
        *_base_rows(base),
        *(line for weighted in plan.adapters for line in adapter_rows(weighted)),
        f"| tensors | {', '.join(f'{n} {action}' for action, n in sorted(counts.items()))} |",
        "",
        f"Merged with peanut-serve. `{MANIFEST_NAME}` tells where every tensor comes from.",
    ]
    return "\n".join(["---", *head, "---", "", *lines, ""])


def _base_rows(base: Checkpoint) -> list[str]:
    """The rows of a table about what was done to a base before the training."""
    rows = [f"| the base before the training | its {describe_changes(base)} |"] if base.changes else []
    if unsaved := base.changes.get("rows_set_to_mean"):
        rows.append(
            f"| not saved by the training | the new rows of {', '.join(unsaved)}: they are the mean of the others |"
        )
    return rows


def base_id_of(plan: Plan) -> str | None:
    """The Hub id of the base: where it came from, or what the adapter's config says it was trained on."""
    trained_on = plan.adapters[0].adapter.base_name or ""
    return plan.base.repo_id or (trained_on if "/" in trained_on and is_hub_id(trained_on) else None)


def formulas_of(plan: Plan) -> list[str]:
    """What the methods of the adapters compute, each once, in Markdown."""
    replacing = ["`W = W_trained` for whole tensors"] if any(not one.adapter.modules for one in plan.adapters) else []
    described = [one.adapter.describe(module) for one in plan.adapters for module in one.adapter.modules]
    return list(dict.fromkeys([*(one.formula for one in described), *replacing]))


def adapter_rows(weighted: Weighted) -> list[str]:
    """The rows of a table about one adapter."""
    adapter = weighted.adapter
    facts = ", ".join(f"{key} = {value}" for key, value in settings_of(adapter).items() if key != "orientation")
    times = "" if weighted.weight == 1 else f"{weighted.weight:g} times "
    return [f"| adapter | {times}{adapter.name}: {facts} |", f"| adapter digest | `{adapter.digest}` |"]
