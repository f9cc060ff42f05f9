"""What a fleet is started with: Ray Serve's `args`, checked before anything starts."""

import sys
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from peanut_serve.settings.server import default_state
from peanut_serve.signals.json_logs import LogFormat
from peanut_serve.tenants.watched import WatchedKeys
from peanut_serve.web.audit import FILE

_SERVER = (sys.executable, "-c", "from peanut_serve.cli.main import main; main()")


class EngineSettings(BaseModel):
    """One engine: a `peanut-serve` process.

    Attributes:
        options: its command line, without the ports and keys, which each replica chooses.
        variables: added to its environment.
        slots: how many variants it answers at once; 1 where weights are swapped.
        command: the program that gets the options.
        start_seconds: how long it may take until it is ready.
        stop_seconds: how long it may take to answer what it runs when it is stopped.
        log_format: of its log; those of Ray Serve are in the same format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: tuple[str, ...]
    variables: dict[str, str] = Field(default_factory=dict)
    slots: PositiveInt = 1
    command: tuple[str, ...] = _SERVER
    start_seconds: PositiveFloat = 1800.0
    stop_seconds: PositiveFloat = 30.0
    log_format: LogFormat = "text"


class FleetSettings(BaseModel):
    """A fleet.

    Attributes:
        engine: what each replica runs.
        replicas: how many.
        gpus: of each replica.
        cpus: of each replica.
        most_waiting: requests that may wait until a replica takes them before the next one is answered with 429.
        key_file: file with the API keys of clients, one in a line; without it no key is needed.
        admin_key_file: the same for operators; without it, or a key of operators in `keys`, there is no admin API.
        keys: file of the keys of many teams; see `peanut_serve/tenants/keys.py`.
        logs: folder for the output of the engines; by default one that only this user has, see `own_folder`.
        state: folder with a folder for the state of each engine of a machine; by default within `logs`.
        audit_log: file of who changed what through the admin API; by default in `state`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    import_path: ClassVar[str] = "peanut_serve.ray.app:build"

    engine: EngineSettings
    replicas: PositiveInt = 1
    gpus: float = Field(default=0.0, ge=0)
    cpus: float = Field(default=1.0, ge=0)
    most_waiting: PositiveInt = 1024
    key_file: Path | None = None
    admin_key_file: Path | None = None
    keys: Path | None = None
    logs: Path | None = None
    state: Path | None = None
    audit_log: Path | None = None

    def watched_keys(self) -> WatchedKeys | None:
        """The keys of the file, if there is one. Raises `OptionError` if it cannot be used."""
        return None if self.keys is None else WatchedKeys(self.keys)

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin API. Raises `OptionError` as `watched_keys`."""
        watched = self.watched_keys()
        return self.admin_key_file is not None or (watched is not None and watched.has_operators)

    @property
    def log_format(self) -> LogFormat:
        """Of all logs."""
        return self.engine.log_format

    @property
    def audit_file(self) -> Path:
        """The audit log of this machine, where the front may run."""
        return self.audit_log or state_folders(self.logs, self.state) / FILE

    def args(self) -> dict[str, Any]:
        """Serve's `args`, whose change restarts all engines."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"replicas", "most_waiting"})

    def in_place(self) -> list[dict[str, Any]]:
        """What Serve changes without restarting an engine, or the front."""
        engine = {"name": "Engine", "num_replicas": self.replicas, "max_queued_requests": self.most_waiting}
        return [engine, {"name": "Front", "user_config": self.of_front()}]

    def of_front(self) -> dict[str, Any]:
        """The `user_config` of the front."""
        return {"most_waiting": self.most_waiting}


def state_folders(logs: Path | None, state: Path | None) -> Path:
    """Where the engines of this machine have their state, see `FleetSettings`."""
    return state or (logs or own_folder()) / "state"


def own_folder() -> Path:
    """Where a machine keeps what belongs to its engines by default: beside the state of single servers."""
    return default_state("fleet")
