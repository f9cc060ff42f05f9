"""Variants that workers evaluate from W0 on their device, compared with what vLLM loads from the host, by shards.

Arguments: the base, an adapter, the number of workers. Prints what was compared as JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from support.engines.probing_worker import weights_of
from support.rounding import tolerance

from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants.on_device.places import KeptTensor, Place, encode_places
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, places_of
from peanut_serve.vllm_plugin.swap.worker import VariantWorker


class ComparingWorker(VariantWorker):
    """Remembers weights, and compares them."""

    remembered: dict[str, dict[str, torch.Tensor]]

    def remember(self, label: str) -> None:
        """Copy all weights that the worker computes with."""
        if not hasattr(self, "remembered"):
            self.remembered = {}
        model = self.model_runner.get_model()
        self.remembered[label] = {name: tensor.clone() for name, tensor in weights_of(model)}

    def compare(self, one: str, other: str) -> tuple[int, int, float]:
        """All numbers, those that differ, and by how much of `tolerance` the farthest does."""
        count, differ, farthest = 0, 0, 0.0
        for name, tensor in self.remembered[one].items():
            again = self.remembered[other][name]
            count, differ = count + tensor.numel(), differ + int((tensor != again).sum())
            if tensor.numel():
                far = (tensor.double() - again.double()).abs() / tolerance(tensor)
                farthest = max(farthest, float(far.max()))
        return count, differ, farthest


def main() -> None:
    from vllm import LLM

    base, adapter, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        str(base), worker_extension_cls="support.engines.comparing_shards.ComparingWorker", enforce_eager=True,
        tensor_parallel_size=workers, max_model_len=64, skip_tokenizer_init=True, dtype="bfloat16",
    )  # fmt: skip
    checkpoint = open_checkpoint(base)

    def call(method: str, *args: object) -> list[object]:
        return list(llm.collective_rpc(method, args=args))

    def apply(places: Sequence[Place], label: str) -> None:
        call("peanut_apply", encode_places(places))
        call("remember", label)

    floats = [info for info in checkpoint.tensors.values() if info.is_float]
    learned = call("peanut_learn", encode_places(floats), True)
    model = LoadedModel(checkpoint, [group for groups in learned for group in groups])  # type: ignore[attr-defined]
    call("remember", "base")
    whole, factored = (
        adapter_version("v", adapter, VersionOpener(model, "cpu", keeps_base=keeps)).evaluate()
        for keeps in (False, True)
    )
    names = model.with_neighbours(whole.places)
    infos = {name: checkpoint.tensors[name] for name in names}
    kept: dict[str, Place] = {name: KeptTensor(info) for name, info in infos.items()}
    apply(list(places_of(names, whole, checkpoint.tensors)), "host")
    room = call("peanut_room", encode_places([*infos.values()]))
    sizes = call("peanut_keep", encode_places([*infos.values()]))
    apply(list(places_of(names, factored, kept)), "device")
    apply([*kept.values()], "restored")
    pairs = {"device": ("host", "device"), "restored": ("base", "restored"), "changed": ("base", "host")}
    found = {what: call("compare", *pair) for what, pair in pairs.items()}
    whole_size = sum(info.nbytes for info in infos.values())
    print("COMPARED", json.dumps({**found, "kept": sizes, "whole": whole_size, "room": room}), flush=True)


if __name__ == "__main__":
    main()
