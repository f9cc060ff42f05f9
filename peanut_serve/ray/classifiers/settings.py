"""What a fleet of classifiers is started with: Ray Serve's `args`, checked before anything starts."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt

from peanut_serve.signals.json_logs import LogFormat
from peanut_serve.tenants.watched import WatchedKeys


class Tunables(BaseModel):
    """What Serve changes without restarting a replica: its `user_config`.

    Attributes:
        loaded: how many tasks a replica keeps loaded.
        most_waiting: inputs that a replica has before the next request is answered with 429.
        batch_wait: seconds that the first input of a batch waits for others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loaded: PositiveInt = 16
    most_waiting: PositiveInt = 1024
    batch_wait: NonNegativeFloat = 0.005


class ClassifierSettings(BaseModel):
    """A fleet of classifiers.

    Attributes:
        folders: the exports, at the same place on every node.
        precision: of all graphs: `fp32`, or one that `--quantize` wrote.
        replicas: how many.
        cpus: of each replica, and threads of a run.
        key_file: file with the API keys of clients, one in a line; without it no key is needed.
        keys: file of the keys of many teams; see `peanut_serve/tenants/keys.py`.
        most_bytes: of a body.
        log_format: of the logs of Ray Serve.
        tunables: see there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    import_path: ClassVar[str] = "peanut_serve.ray.classifiers.app:build"
    gpus: ClassVar[float] = 0.0  # ONNX Runtime runs on the CPU here

    folders: tuple[Path, ...] = Field(min_length=1)
    precision: str = "fp32"
    replicas: PositiveInt = 1
    cpus: float = Field(default=1.0, ge=0)
    key_file: Path | None = None
    keys: Path | None = None
    most_bytes: PositiveInt = 16 << 20
    log_format: LogFormat = "text"
    tunables: Tunables = Tunables()

    def watched_keys(self) -> WatchedKeys | None:
        """The keys of the file, if there is one. Raises `OptionError` if it cannot be used."""
        return None if self.keys is None else WatchedKeys(self.keys)

    def args(self) -> dict[str, Any]:
        """Serve's `args`, whose change restarts all replicas."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"replicas", "tunables"})

    def in_place(self) -> list[dict[str, Any]]:
        """What Serve changes without restarting a replica, or the front."""
        replica = {"name": "Classifier", "num_replicas": self.replicas, "user_config": self.tunables.model_dump()}
        return [replica, {"name": "ClassifierFront", "user_config": self.of_front()}]

    def of_front(self) -> dict[str, Any]:
        """The `user_config` of the front: how many requests may wait at all replicas together."""
        return {"most_waiting": self.replicas * self.tunables.most_waiting}
