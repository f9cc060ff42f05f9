"""The shape of the images or spectrograms that a graph takes, which is fixed in it."""

from pathlib import Path

from converters.errors import ConversionError, OptionError
from converters.inference.audio import AudioPreprocessor
from converters.inference.examples import full_config
from converters.inference.images import PROCESSOR_FILE, image_shape
from converters.inference.kinds import ModelKind
from converters.inference.media_models import MEDIA_MODELS, Media, image_config, mel_shape
from converters.plans.merge import Plan


def example_shape(plan: Plan, kind: ModelKind, interpolates: bool) -> tuple[int, ...] | None:
    """The shape of an example without the batch; None for texts and for sounds as samples, which have any length.

    Args:
        plan: has the config, and the folders that may hold a preprocessor.
        kind: what the graph takes.
        interpolates: whether embeddings of positions are interpolated for images of another size.

    Raises:
        CheckpointError: the preprocessor is unusable, or does not match the model.
        ConversionError: the model has no positions for images of the preprocessor's size.
        OptionError: `interpolates` is set for a model that has no such option.
    """
    known = MEDIA_MODELS.get(str(plan.config.get("model_type")))
    if interpolates and not (known and known.interpolates):
        names = ", ".join(name for name, model in MEDIA_MODELS.items() if model.interpolates)
        raise OptionError(
            f"interpolate_pos_encoding= is for {names}, but this model is a {plan.config.get('model_type')}, for "
            "which transformers has no such option; leave it out"
        )
    if known is None:
        return None
    folder = _preprocessor_folder(plan)
    if known.media is Media.IMAGE:
        shape = image_shape(folder, plan.config)
        if known.one_size and not interpolates:
            _check_size(folder, plan, shape)
        return shape
    if (folder / PROCESSOR_FILE).is_file():
        AudioPreprocessor(folder, kind, plan.config)
    return mel_shape(full_config(folder, plan.config)) if known.media is Media.MEL else None


def _preprocessor_folder(plan: Plan) -> Path:
    """The adapter's own preprocessor takes precedence over the base's."""
    own = plan.head.path
    return own if (own / PROCESSOR_FILE).is_file() else plan.base.folder


def _check_size(folder: Path, plan: Plan, shape: tuple[int, int, int]) -> None:
    size = image_config(full_config(folder, plan.config)).image_size
    height, width = (size, size) if isinstance(size, int) else size
    if shape[1:] != (height, width):
        raise ConversionError(
            f"{folder / PROCESSOR_FILE} makes images of {shape[1]} x {shape[2]} (height x width), but the model has "
            f"positions for {height} x {width}; use interpolate_pos_encoding= if it is to be run with "
            "transformers' interpolate_pos_encoding=True, or expected the preprocessor it was trained with"
        )
