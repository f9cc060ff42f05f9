"""Where a worker spends its time when it applies a variant: vLLM's own reload, taken to pieces by a stopwatch.

    python benchmarks/swapping.py --profile

It runs this file for each model. An engine applies two variants by turns, first as it comes and then with the
stopwatch. A stage's time is without that of the stages within it.
"""

import asyncio
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM
from vllm.model_executor.model_loader.reload import inplace, layerwise

from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants.host_cache import BaseWeights
from peanut_serve.variants.on_device.places import KeptTensor, Place, encode_places
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, places_of
from peanut_serve.vllm_plugin.swap import mapping
from peanut_serve.vllm_plugin.swap import worker as variant_worker
from peanut_serve.vllm_plugin.swap.packed import PackedLayers
from peanut_serve.vllm_plugin.swap.worker import VariantWorker

_ENOUGH = 8 << 30  # bytes, for the packed layers of all variants
COUNT, LOAD, PACK = "count elements, on meta", "copy into the layer", "process (repack)"
STAGES = (
    (variant_worker, "decode_places", "decode the places"),
    (mapping.Maps, "whole", "map the host's files"),
    (layerwise, "materialize_layer", "allocate a layer"),
    (layerwise, "_copy_and_restore_kernel_tensors", "copy back"),
    (inplace, "initialize_layerwise_reload", "prepare all layers"),
    (inplace, "finalize_layerwise_reload", "put back layers not loaded"),
    (layerwise, "get_numel_loaded", COUNT),
)


class Stopwatch:
    """Seconds, page faults and calls of each stage, without those of stages within it."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._inner: list[list[float]] = []
        self._is_counting = False

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function with a stopwatch; what runs while vLLM counts elements is part of that."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            """Call it, and add its time to its stage, less that of the stages inside."""
            if self._is_counting:
                return call(*args, **kwargs)
            self._is_counting = stage == COUNT
            start = _now()
            self._inner.append([0.0, 0.0])
            try:
                return call(*args, **kwargs)
            finally:
                took = [after - before for after, before in zip(_now(), start, strict=True)]
                own = [all_ - inner for all_, inner in zip(took, self._inner.pop(), strict=True)]
                self.stages[stage] = [old + new for old, new in zip(self.stages[stage], [*own, 1], strict=True)]
                if self._inner:
                    self._inner[-1] = [old + new for old, new in zip(self._inner[-1], took, strict=True)]
                self._is_counting = False

        return timed

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Time vLLM's functions."""
        find_loader = layerwise._get_original_loader
        methods = {type(layer.quant_method) for layer in model.modules() if hasattr(layer, "quant_method")}
        places = [*STAGES, *((method, "process_weights_after_loading", PACK) for method in methods)]
        patches = [
            patch.object(owner, name, self.timed(stage, getattr(owner, name))) for owner, name, stage in places
        ]
        patches.append(
            patch.object(layerwise, "_get_original_loader", lambda tensor: self.timed(LOAD, find_loader(tensor)))
        )
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


def _now() -> list[float]:
    return [time.perf_counter(), float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)]


class ProfiledWorker(VariantWorker):
    """Applies variants, and says what took how long."""

    def peanut_profile(self, one: str, other: str, runs: int) -> dict[str, Any]:
        """Seconds as it comes, seconds with the stopwatch, and the stages."""
        turns = [one, other] * runs
        for places in (one, other):
            self.peanut_apply(places)
        plain = [self.peanut_apply(places) for places in turns]
        watch = Stopwatch()
        with watch.running(self.model_runner.get_model()):
            apply = watch.timed("the rest: names, arguments", self.peanut_apply)
            timed = [apply(places) for places in turns]
        return {"plain": plain, "timed": timed, "stages": dict(watch.stages)}

    def peanut_ways(self, ways: dict[str, tuple[int, list[str]]], runs: int) -> dict[str, list[float]]:
        """Seconds of each load by way, in turn, but for the first; `ways` has (packed cache, places)."""
        caches = {name: PackedLayers(limit) for name, (limit, _) in ways.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs + 1):
            for name, (_, turns) in ways.items():
                self.peanut_packed = caches[name]
                found[name].append(sum(self.peanut_apply(places) for places in turns) / len(turns))
        return {name: seconds[1:] for name, seconds in found.items()}


def evaluated(llm: LLM, base: Path, adapters: Path, names: list[str]) -> Iterator[list[Place]]:
    """What has to be applied for each of the variants, on the host as `peanut-serve` has it there."""
    checkpoint = open_checkpoint(base)
    everything = encode_places([info for info in checkpoint.tensors.values() if info.is_float])
    model = LoadedModel(checkpoint, llm.collective_rpc("peanut_learn", args=(everything,))[0])
    on_host = BaseWeights(checkpoint, on_host=True)
    for name in names:
        weights = adapter_version(name, adapters / name, VersionOpener(model, "cpu")).evaluate()
        touched = model.with_neighbours(weights.places)
        asyncio.run(on_host.prepare(touched))
        yield list(places_of(touched, weights, on_host.tensors))


def device_places(llm: LLM, base: Path, adapters: Path, names: list[str]) -> Iterator[list[Place]]:
    """The same for workers that keep W0; the last one is the base itself."""
    checkpoint = open_checkpoint(base)
    everything = encode_places([info for info in checkpoint.tensors.values() if info.is_float])
    model = LoadedModel(checkpoint, llm.collective_rpc("peanut_learn", args=(everything, True))[0])
    for name in names:
        weights = adapter_version(name, adapters / name, VersionOpener(model, "cpu", keeps_base=True)).evaluate()
        infos = [checkpoint.tensors[one] for one in model.with_neighbours(weights.places)]
        llm.collective_rpc("peanut_keep", args=(encode_places(infos),))
        kept: dict[str, Place] = {info.name: KeptTensor(info) for info in infos}
        yield list(places_of(kept, weights, kept))
    yield list(kept.values())


def main() -> None:
    """Print `PROFILE` and what was found, as JSON."""
    base, adapters, names, options, runs = json.loads(sys.argv[1])
    llm = LLM(base, worker_extension_cls="swapping_profile.ProfiledWorker", enforce_eager=True, **options)
    one, other = evaluated(llm, Path(base), Path(adapters), names)
    places = encode_places(one), encode_places(other)
    found = llm.collective_rpc("peanut_profile", args=(*places, runs))[0]
    start = time.perf_counter()
    inside = llm.collective_rpc("peanut_apply", args=(places[0],))[0]
    found |= {"rpc": time.perf_counter() - start - inside, "nbytes": sum(info.nbytes for info in one)}
    *factored, restored = device_places(llm, Path(base), Path(adapters), names)
    ways = {
        "host, packed anew": (0, places),
        "host, exchanged": (_ENOUGH, places),
        "device, packed anew": (0, [*map(encode_places, factored)]),
        "device, exchanged": (_ENOUGH, [*map(encode_places, factored)]),
        "device, back to the base, packed anew": (0, [encode_places(restored)]),
    }
    found["ways"] = llm.collective_rpc("peanut_ways", args=(ways, runs))[0]
    found["factors"] = sum(place.nbytes for place in factored[0])
    print("PROFILE", json.dumps(found))


if __name__ == "__main__":
    main()
