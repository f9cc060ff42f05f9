"""Adapters with random settings and random θ of every method of PEFT: merged right, or refused for a known reason.

`PEANUT_SWEEP=5000:7000` tries the seeds from 5000 to 6999 instead of the first ones.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from peft.utils import PeftType
from support.sweep.random_adapters import Outcome, examine
from support.sweep.random_settings import NAMES, ROUND

from converters.adapters.refusals import NOT_MERGEABLE

FIRST, LAST = map(int, os.environ.get("PEANUT_SWEEP", f"0:{2 * len(ROUND)}").split(":"))

# what a merge may refuse of what PEFT trains
REFUSALS = (
    r"has no bias in the base, and a beft adapter changes biases",
    r"θ adds to the bias of this module, and the base has none",
    r"what was trained has a cosine of .* with what (pissa|olora) takes from W0, where it began",
    r"bias is saved whole by the adapter, and updated by it as well \(as with bias and lora_bias",
    r"the indices were not saved \(save_indices is false",
)


def test_every_method_is_drawn() -> None:
    assert set(NAMES.values()) == {one.value for one in PeftType} - NOT_MERGEABLE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, LAST, len(ROUND)))
def test_random_settings_are_merged_right_or_refused(first: int, tmp_path: Path) -> None:
    """A round of all methods. To see one seed again: PEANUT_SWEEP=seed:seed+1."""
    outcomes: dict[int, Outcome] = {}
    for seed in range(first, min(first + len(ROUND), LAST)):
        (tmp_path / str(seed)).mkdir()
        outcomes[seed] = examine(seed, tmp_path / str(seed))
    refused = {seed: one.sentence for seed, one in outcomes.items() if one.kind == "refused"}
    assert not {seed: one for seed, one in outcomes.items() if one.kind == "wrong"}
    assert not {seed: why for seed, why in refused.items() if not any(re.search(one, why) for one in REFUSALS)}
    kinds = Counter(one.kind for one in outcomes.values())
    assert kinds["right"] >= len(outcomes) // 2 or len(outcomes) < len(ROUND), outcomes
