"""One traced base: what all its tasks share while they are written."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from onnx import GraphProto
from torch import Tensor

from converters.errors import ConversionError
from converters.models.architecture import Architecture
from converters.outputs.onnx.graphs.reference import Reference
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.graphs.template import Template


@dataclass(frozen=True, eq=False)
class TracedBase:
    """A base in torch and as a graph.

    Attributes:
        arch: the names of its class.
        reference: the base in torch.
        template: its graph.
        updates: graphs of f, by what they depend on.
    """

    arch: Architecture
    reference: Reference
    template: Template
    updates: dict[str, GraphProto] = field(default_factory=dict)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The base's weight for every weight of the graph; for those it lacks, the one transformers initialised."""
        found = self.reference.weights()
        return {name: found[name] for name in self.template.shapes}

    def linear_shape(self, weight: str) -> tuple[int, int]:
        """(out, in) of a linear layer; a Conv1D stores its weight as (in, out)."""
        out, width = self.template.shapes[weight]
        return (out, width) if weight.removesuffix(".weight") in self.arch.linear else (width, out)

    def within(self, task: TaskWeights) -> TaskWeights:
        """A task without the updates that the graph lacks: of the tower for texts, in a graph of an image encoder.

        Of tensors that are tied, it has the one whose name the graph has.

        Raises `ConversionError` if the graph has nothing of what the task changes.
        """
        aliases = {*self.arch.tied, *self.arch.tied.values()}  # a graph has one of their names
        inside = {*self.template.shapes, *aliases}
        if not inside & task.tensors.keys():
            raise ConversionError(
                f"{task.plan.name} changes {next(iter(task.tensors), 'nothing')} and no weight that the graph of "
                f"{', '.join(self.template.kind.outputs)} depends on; it would be the base's"
            )
        names = {name: self._name_in_graph(name, task) for name in task.tensors}
        return replace(
            task,
            updated={names[name]: one for name, one in task.updated.items() if name in inside},
            tensors={names[name]: tensor for name, tensor in task.tensors.items()},
        )

    def _name_in_graph(self, name: str, task: TaskWeights) -> str:
        """The name of a tensor of a task in the graph: its own, or of one that is tied to it."""
        if name in self.template.shapes:
            return name
        tied = [{alias, source} for alias, source in self.arch.tied.items() if name in (alias, source)]
        partners = sorted(set().union(*tied) - {name})
        return next((one for one in partners if one in self.template.shapes and one not in task.tensors), name)

    def check_complete(self, task: TaskWeights) -> None:
        """Raise `ConversionError` if the graph has a weight that neither the base nor the task holds."""
        lacking = self.reference.missing & self.template.shapes.keys()
        if made_up := sorted(lacking - task.tensors.keys()):
            raise ConversionError(
                f"neither the base nor {task.plan.name} has {made_up[0]}, which {self.arch.name} needs: it would be "
                "random; check whether the adapter lacks its head (modules_to_save)"
            )
