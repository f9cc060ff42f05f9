"""The files that start a server: each is checked by the tool that reads it, and its command line by the command."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from support.commands import Run
from support.paths import ROOT
from support.tiny_models import Pair
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from peanut_serve.web.routes import _ACCESS, Access

pytestmark = pytest.mark.slow

OPERATIONS = ROOT / "examples" / "operations"
UNIT = OPERATIONS / "peanut-serve.service"
KUBERNETES = sorted((OPERATIONS / "kubernetes").glob("*.yaml"))
TOOLS = Path(sys.executable).parent
KEYS = {"VLLM_API_KEY": "a-key", "PEANUT_ADMIN_KEY": "another"}


class Unit(RawConfigParser):
    """A unit file; systemd's names are case-sensitive."""

    optionxform = staticmethod(str)  # type: ignore[assignment]


def unit() -> Unit:
    parser = Unit(delimiters=("=",), comment_prefixes=("#",), interpolation=None)
    parser.read(UNIT)
    return parser


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, its continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line]


def last(instruction: str) -> str:
    return [rest for found, rest in dockerfile() if found == instruction][-1]


def compose(*files: str) -> dict[str, object]:
    """The compose files as Docker understands them."""
    options = [part for file in files for part in ("-f", str(OPERATIONS / file))]
    done = subprocess.run(
        [TOOLS / "docker-compose", *options, "config", "--format", "json"],
        capture_output=True, text=True, timeout=60, env=KEYS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]["peanut-serve"]


def manifests() -> dict[str, dict]:
    """Kind -> manifest."""
    found = [yaml.safe_load(file.read_text()) for file in KUBERNETES]
    return {manifest["kind"]: manifest for manifest in found}


def pod() -> dict:
    return manifests()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


def test_the_image_has_no_faults_that_hadolint_knows() -> None:
    done = subprocess.run(
        [TOOLS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_special() -> None:
    names = [found for found, _ in dockerfile()]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last("USER"))
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "ADD" not in names
    assert json.loads(last("ENTRYPOINT")) == ["peanut-serve"]
    declared = " ".join(rest for found, rest in dockerfile() if found in ("ENV", "ARG"))
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", declared)
    assert [rest.split("=")[0] for found, rest in dockerfile() if found == "ARG"] == ["BASE", "VLLM"]


def test_the_image_is_built_from_what_is_let_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for found, rest in dockerfile()
        if found == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert ignored[1] == "*"
    assert copied == let_in
    assert all((ROOT / path).exists() for path in let_in)
    assert "--constraint .ci/constraints.txt" in " ".join(rest for _, rest in dockerfile())


def test_health_is_asked_where_no_key_is_needed() -> None:
    (asked,) = re.findall(r"127\.0\.0\.1:8000(/\w+)", last("HEALTHCHECK"))
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert probes["readiness"]["path"] == "/ready"
    assert {asked, probes["startup"]["path"], probes["liveness"]["path"]} == {"/health"}
    for path in (asked, *(probe["path"] for probe in probes.values())):
        assert _ACCESS[path] is Access.OPEN


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=len)
def test_compose(files: list[str]) -> None:
    service = compose(*files)
    assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    mounted = {volume["target"] for volume in service["volumes"]}
    assert {"/models", *json.loads(last("VOLUME"))} == mounted
    assert service["stop_grace_period"] == "2m0s"
    arguments = {rest.split("=")[0] for found, rest in dockerfile() if found == "ARG"}
    assert set(service["build"].get("args", {})) <= arguments


def test_compose_refuses_to_start_without_keys() -> None:
    done = subprocess.run(
        [TOOLS / "docker-compose", "-f", OPERATIONS / "compose.yaml", "config", "-q"],
        capture_output=True, text=True, timeout=60, env={},
    )  # fmt: skip
    assert done.returncode != 0
    assert "set the key of" in done.stderr


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.stem)
def test_kubernetes_takes_the_manifests(file: Path) -> None:
    kubernetes_validate.validate(yaml.safe_load(file.read_text()), "1.37", strict=True)


def test_the_validator_sees_a_misspelt_field() -> None:
    manifest = manifests()["Deployment"]
    manifest["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_the_manifests_belong_together() -> None:
    found = manifests()
    deployment = found["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert f"--port={ports['http']}" in container()["args"]
    assert f"--admin-port={ports['admin']}" in container()["args"]
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http"]
    admin = [rule for rule in found["NetworkPolicy"]["spec"]["ingress"] if rule["ports"][0]["port"] == "admin"]
    assert [set(rule["from"][0]["podSelector"]) for rule in admin] == [{"matchLabels"}]
    volumes = {volume["name"] for volume in pod()["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert mounts.keys() == volumes
    assert {"/models", "/tmp", *json.loads(last("VOLUME"))} <= set(mounts.values())
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod()["volumes"] if len(volume) == 2
              and "persistentVolumeClaim" in volume}  # fmt: skip
    assert claims == {found["PersistentVolumeClaim"]["metadata"]["name"]}


def test_a_pod_has_time_to_finish_and_few_rights() -> None:
    wait = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] >= wait + 120
    assert f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}" == last("USER")
    assert container()["securityContext"]["allowPrivilegeEscalation"] is False
    assert not pod()["automountServiceAccountToken"]
    assert not pod()["enableServiceLinks"]
    assert all("secretKeyRef" in one["valueFrom"] for one in container()["env"] if one["name"].endswith("_KEY"))


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is needed: install the package systemd"
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/peanut-serve/bin/", f"{TOOLS}/"))
    verify = [program, "verify", "--man=no", copy]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert (done.returncode, UNIT.name in done.stderr) == (0, False), done.stderr
    secure = [program, "security", "--offline=true", "--threshold=20", "--no-pager", copy]
    done = subprocess.run(secure, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    copy.write_text(copy.read_text().replace("KillMode=mixed", "KillMode=mixt"))
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert "kill mode" in done.stderr


def test_a_unit_that_is_stopped_answers_what_runs() -> None:
    service = unit()["Service"]
    assert service["KillMode"] == "mixed"  # the engine gets no SIGTERM beside the server
    assert int(service["TimeoutStopSec"]) >= 90
    assert service["EnvironmentFile"].startswith("/etc/")
    assert not re.search(r"KEY|TOKEN", service["Environment"] + service["ExecStart"])


STARTS = {
    "compose": lambda: ["peanut-serve", *compose("compose.yaml")["command"]],
    "kubernetes": lambda: ["peanut-serve", *container()["args"]],
    "systemd": lambda: shlex.split(unit()["Service"]["ExecStart"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_command_line(
    pair: Pair, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each server would start, with options that vLLM knows; with other folders, and a port that is free."""
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PEANUT_STATE", str(tmp_path / "state"))
    shutil.copytree(pair.adapter, tmp_path / "adapters" / "gsm8k")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program, *arguments = STARTS[name]()
    assert Path(program).name == "peanut-serve"
    moved = [re.sub(r"^(--\S+=)?(/srv)?/models/", rf"\g<1>{tmp_path}/", argument) for argument in arguments]
    moved = [re.sub(r"^(--\S+=)?/var/(lib|cache)/", rf"\g<1>{tmp_path}/", argument) for argument in moved]
    moved = [re.sub(r"^(--admin-port=)?8001$", rf"\g<1>{port}", argument) for argument in moved]
    assert not [argument for argument in moved if "/var/" in argument or re.search("(=|^)/models", argument)]
    done = run_here("peanut-serve", *moved, "--dry-run")
    assert "variants: gsm8k" in done.stdout, done.stderr
    vllm = shlex.split(done.stdout.splitlines()[-1])[2:]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm)
    assert (parsed.port, parsed.host) == (8000, "127.0.0.1" if name == "systemd" else "0.0.0.0")


def test_the_image_without_arguments_explains_itself(run_here: Run) -> None:
    done = run_here(*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD")))
    assert (done.returncode, "Usage: peanut-serve" in done.stdout) == (0, True)
