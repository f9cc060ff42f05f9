"""The base that θ was trained on: the checkpoint on disk, or what the training made of it before it began."""

from collections.abc import Sequence

from converters.adapters.adapter import Adapter
from converters.models.checkpoint import Checkpoint
from converters.plans.trained_base.replication import replicate_layers
from converters.plans.trained_base.vocabulary import resize_vocabulary


def as_trained(base: Checkpoint, adapters: Sequence[Adapter], dtype: str) -> tuple[Checkpoint, list[str]]:
    """The base of a merge; returns it with notes for the user. It is `base` itself for nearly every adapter.

    Args:
        base: the checkpoint on disk.
        adapters: the adapters of one merge.
        dtype: of the merge, see `plan_merge`.

    Raises:
        OptionError: the adapters were trained on different ones, or the base is streamed, or inside the adapter.
        AdapterConfigError, TargetError: its layers cannot be stacked as the config says.
        BaseMismatchError: the saved embeddings are not of this base.
    """
    stacked, notes = replicate_layers(base, adapters)
    resized, more = resize_vocabulary(stacked, adapters, dtype)
    return resized, [*notes, *more]


def describe_changes(base: Checkpoint) -> str:
    """What was done to a base before the training, as the end of `a base whose ...`."""
    done = ["layers were stacked (layer_replication)"] if "layer_replication" in base.changes else []
    if "vocab_size" in base.changes:
        old, new = base.changes["vocab_size"]
        done.append(f"vocabulary was resized from {old} to {new}")
    return " and ".join(done)
