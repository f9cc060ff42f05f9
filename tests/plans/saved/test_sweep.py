"""A handful of the sweep of `make zoo`: PEFT's default targets and heads, merged, are what PEFT computes."""

from pathlib import Path

import pytest
from support.sweep.specimens import TASKS, examine

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal", "gpt_bigcode"),
        ("sequence", "distilbert"),
        ("image", "resnet"),
        pytest.param("causal", "qwen3_next", marks=SLOW),
        pytest.param("causal", "deepseek_v3", marks=SLOW),
        pytest.param("causal", "nemotron_h", marks=SLOW),
        pytest.param("causal", "hunyuan_v1_moe", marks=SLOW),
        pytest.param("sequence", "xlnet", marks=SLOW),
        pytest.param("token", "electra", marks=SLOW),
        pytest.param("image", "swinv2", marks=SLOW),
    ],
)
def test_a_merge_with_the_defaults_of_peft_is_right(task: str, model_type: str, tmp_path: Path) -> None:
    outcome = examine(task, model_type, tmp_path)
    assert outcome.kind == "right", outcome


def test_every_task_has_its_types() -> None:
    assert all("llama" in TASKS[task].model_types for task in ("causal", "sequence", "token"))
    assert "vit" in TASKS["image"].model_types
