"""The kind of graph of a planned task."""

from converters.inference.kinds import ModelKind, find_kind
from converters.plans.merge import Plan


def kind_of(plan: Plan) -> ModelKind:
    """The inputs and outputs of the graph of a plan.

    Raises `ConversionError`, listing the supported models, if it cannot be exported.
    """
    return find_kind(plan.config)
