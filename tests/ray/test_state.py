"""Each replica of a machine has a state folder of its own, and a restarted fleet the same ones."""

import subprocess
import sys
from pathlib import Path

from peanut_serve.ray.state import StateFolder
from peanut_serve.variants.state_folder import VariantStore


def test_replicas_of_a_machine_have_folders_of_their_own(tmp_path: Path) -> None:
    taken = [StateFolder.take(tmp_path / "state") for _ in range(3)]
    assert [one.path.name for one in taken] == ["0", "1", "2"]
    taken[1].close()
    assert StateFolder.take(tmp_path / "state").path == taken[1].path


def test_a_folder_whose_engine_still_runs_is_not_taken(tmp_path: Path) -> None:
    store = VariantStore(tmp_path / "0")
    assert StateFolder.take(tmp_path).path.name == "1"
    store.close()
    free = StateFolder.take(tmp_path)
    assert free.path.name == "0"
    VariantStore(free.path).close()  # the engine of the replica that has the folder takes it


def test_a_killed_replica_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    code = "import sys, pathlib; from peanut_serve.ray.state import StateFolder; "
    code += "taken = StateFolder.take(pathlib.Path(sys.argv[1])); print(taken.path.name, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "0\n"
        second = StateFolder.take(tmp_path)
        assert second.path.name == "1"
        replica.kill()
    assert StateFolder.take(tmp_path).path.name == "0"
