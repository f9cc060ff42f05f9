"""Convolutions beside which HF PEFT computes an update that no weight of theirs can do.

PEFT's own layers (`peft/tuners/lora/layer.py`, `_ConvNd`) take over the kernel, the stride and the padding of the
convolution, and nothing else that its forward pass does with its weight.
"""

from typing import Any


def find_obstacles(model: Any) -> dict[str, str]:
    """Name of a convolution of a model -> why an update that PEFT computes beside it is not one of its weight."""
    import torch

    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    found = {name: _obstacle(module) for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: why for name, why in found.items() if why is not None}


def _obstacle(module: Any) -> str | None:
    if "WeightStandardized" in type(module).__name__:
        return "standardises its weight in its forward pass, and PEFT adds the update beside that"
    if all(size == 1 for size in module.kernel_size):
        return None
    if module.padding_mode != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}, and PEFT computes the update with zeros there"
    if any(step > 1 for step in module.dilation):
        return f"has dilation {module.dilation}, and PEFT computes the update without"
    return None
