"""Uploading merged output to a Hub on loopback."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars
from support.commands import Run, run
from support.hub.server import Hub, hub_settings, serve_hub
from support.tiny_models import Pair

pytestmark = pytest.mark.slow  # merges, and sends over HTTP

REPO = "user/merged"

Push = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub(pair: Pair):
    with serve_hub({"org/model": pair.base}) as hub:
        yield hub


@pytest.fixture
def push(hub: Hub, pair: Pair, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> Push:
    """Merge and push in this process, without huggingface_hub's delays between retries."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    disable_progress_bars()  # the command does it before importing huggingface_hub, which is already imported here

    def push(*options: str, repo: str | None = REPO) -> CompletedProcess[str]:
        where = () if repo is None else ("--push-to-hub", repo)
        arguments = ("--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, "--json")
        return run_here("peanut-merge", *arguments, *where, *options)

    return push


def files_in(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def on_hub(hub: Hub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """The files of a repository, without the one that the Hub itself adds to each."""
    files = files_in(hub.uploads.repositories[repo].folder(branch))
    del files[".gitattributes"]
    return files


def test_a_merge_goes_to_the_hub_in_one_commit(hub: Hub, pair: Pair) -> None:
    options = ("--push-to-hub", REPO, "--token", "hf_writer", "-o", pair.output)
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, *options, **hub_settings(hub, pair))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed to {hub.url}/user/merged"
    assert on_hub(hub) == files_in(pair.output)
    assert on_hub(hub)["README.md"].startswith(b"---\n")
    _, pushed = hub.uploads.repositories[REPO].commits["main"]
    assert pushed.message.startswith("adapter on base, by peanut-serve ")
    again = ("--base", REPO, "--adapter", pair.adapter, "-o", pair.output.with_name("again"))
    refused = run("peanut-merge", *again, **hub_settings(hub, pair))
    assert refused.returncode == 1
    assert "its weights already contain an adapter" in refused.stderr


def test_a_peft_adapter_goes_to_the_hub_and_comes_back(hub: Hub, pair: Pair, push: Push) -> None:
    done = push("--format", "peft", repo="user/theta")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed_to"] == f"{hub.url}/user/theta"
    assert on_hub(hub, "user/theta") == files_in(pair.output)
    fetched, local = pair.output.with_name("fetched"), pair.output.with_name("local")
    for adapter, output in (("user/theta", fetched), (pair.adapter, local)):
        options = ("--adapter", str(adapter), "-o", output)
        assert run("peanut-merge", "--base", pair.base, *options, **hub_settings(hub, pair)).returncode == 0
    assert files_in(fetched)["model.safetensors"] == files_in(local)["model.safetensors"]
    arguments = ("--base", pair.base, "--adapter", "user/theta", "--push-to-hub", "User/Theta")
    refused = run("peanut-merge", *arguments, "-o", pair.output.with_name("no"), **hub_settings(hub, pair))
    assert refused.stderr.strip() == (
        "peanut-merge: User/Theta is an input of this merge; push to another repository, or give --push-revision"
    )


def test_another_push_leaves_no_weights_of_the_one_before(hub: Hub, pair: Pair, push: Push) -> None:
    assert push("--max-shard-size", "20KB").returncode == 0
    assert len([name for name in on_hub(hub) if name.endswith(".safetensors")]) > 2
    repository = hub.uploads.repositories[REPO]
    mine = {"notes.md": b"mine", "extra/theta.safetensors": b"mine, too"}
    repository.apply("main", "notes", {**mine, "adapter_config.json": b"{}"}, [])
    assert push("--overwrite").returncode == 0
    assert on_hub(hub) == {**files_in(pair.output), **mine}
    assert "model.safetensors.index.json" in repository.commits["main"][-1].deleted
    assert len(repository.commits["main"]) == 4  # the initial one, two pushes, the notes
    sent = len(hub.uploads.received)
    assert push("--overwrite").returncode == 0  # nothing changed: no commit
    assert (len(repository.commits["main"]), len(hub.uploads.received)) == (4, sent)


def test_private(hub: Hub, pair: Pair, push: Push) -> None:
    assert push("--private").returncode == 0
    assert push("--private", "--overwrite").returncode == 0
    assert hub.uploads.repositories[REPO].private
    assert push("--overwrite", repo="user/public").returncode == 0
    before = hub.uploads.repositories["user/public"].commits["main"]
    refused = push("--private", "--overwrite", "--dtype", "bf16", repo="user/public")
    assert refused.returncode == 1
    assert refused.stderr.strip() == (
        "peanut-merge: user/public is public on the Hub; make it private there, or leave out --private"
    )
    assert hub.uploads.repositories["user/public"].commits["main"] == before


def test_a_branch(hub: Hub, pair: Pair, push: Push) -> None:
    for options in ((), ("--overwrite",)):
        done = push("--push-revision", "trial/bf16", "--dtype", "bf16", *options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["pushed_to"] == f"{hub.url}/user/merged/tree/trial%2Fbf16"
    assert on_hub(hub, branch="trial/bf16") == files_in(pair.output)
    assert on_hub(hub) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["user/merged", "--token", "hf_old"], "the Hub rejected this token (401); pass --token, set HF_TOKEN"),
        (
            ["other/merged"],
            "the Hub denied access (403: You don't have the rights to create a model under the namesp",
        ),
        (
            ["org/model"],
            "the Hub denied access (403: Authorization error: you have no write access to org/model); use",
        ),
        (
            ["org/model", "--push-revision", "main"],
            "nothing can be pushed to org/model@main: the Hub denied access (403",
        ),
        (["merged"], "merged cannot be a repository on the Hub; expected user/name"),
        (["user/a--b"], "nothing can be pushed to user/a--b: "),
    ],
)
def test_what_is_refused_before_the_merge(hub: Hub, pair: Pair, push: Push, options: list[str], message: str) -> None:
    refused = push("--push-to-hub", *options, repo=None)
    assert (refused.returncode, message in refused.stderr) == (1, True), refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not pair.output.exists()
    assert not hub.uploads.repositories


def test_a_hub_that_cannot_be_used_is_noticed_before_the_merge(
    hub: Hub, pair: Pair, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses() -> str:
        refused = push()
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert not pair.output.exists()
        return refused.stderr

    hub.limited["/api/repos/create"] = 1
    assert "the rate limit of the Hub was reached (429); try again in 55 s" in refuses()
    monkeypatch.delenv("HF_TOKEN")
    assert "the Hub requires a token (401); pass --token, set HF_TOKEN, or log in: hf auth login" in refuses()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "offline mode is on; unset HF_HUB_OFFLINE" in refuses()
    hub.dies_at = "/"
    assert "the Hub cannot be reached or closed the connection (Server disconnected" in refuses()
    assert (
        "the Hub cannot be reached or closed the connection ([Errno 111] Connection refused); check the network"
        in refuses()
    )


def test_what_the_merge_itself_refuses_creates_no_repository(hub: Hub, pair: Pair, push: Push) -> None:
    pair.output.mkdir()
    (pair.output / "mine").touch()
    assert "exists; choose another output" in push().stderr
    assert not hub.uploads.repositories


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, pair: Pair, push: Push) -> None:
    hub.dies_at = "/"
    done = push("--dry-run", "--private")
    assert (done.returncode, json.loads(done.stdout)["dry_run"]) == (0, True)
    assert push("--dry-run", repo="merged").returncode == 1
    assert not hub.dead


def test_options_of_no_use(hub: Hub, pair: Pair, push: Push) -> None:
    for options in (["--private"], ["--push-revision", "trial"]):
        assert f"{options[0]} needs --push-to-hub" in push(*options, repo=None).stderr
    assert "--push-to-hub takes one output, --each makes several" in push("--each").stderr
    assert not pair.output.exists()


@pytest.mark.parametrize("step", ["/info/lfs/objects/batch", "/store/", "/commit/"])
def test_a_hub_that_goes_away_during_the_upload(hub: Hub, pair: Pair, push: Push, step: str) -> None:
    hub.dies_at = step
    failed = push()
    assert (failed.returncode, failed.stdout) == (1, "")
    message = failed.stderr.splitlines()[-1]
    assert message.startswith(
        f"peanut-merge: {pair.output} is complete, but its upload to user/merged failed: the Hub "
    )
    assert on_hub(hub) == {}
    checked = push("--resume", repo=None)  # reads all of it
    assert (checked.returncode, json.loads(checked.stdout)["taken_over"]) == (0, 21)


def test_how_to_try_again_is_said(hub: Hub, pair: Pair, push: Push) -> None:
    assert push("--max-shard-size", "20KB", "--push-revision", "trial").returncode == 0
    hub.limited["/commit/"] = 1
    failed = push("--overwrite", "--push-revision", "trial")
    assert "the rate limit of the Hub was reached (429)" in failed.stderr
    command = failed.stderr.splitlines()[-1].partition("To repeat only the upload: ")[2]
    assert command.startswith(f"hf upload user/merged {pair.output} --revision trial ")
    again = run(*shlex.split(command), **hub_settings(hub, pair), HF_TOKEN="hf_writer")
    assert again.returncode == 0, again.stderr
    assert on_hub(hub, branch="trial") == files_in(pair.output)


def test_a_push_of_somebody_else_in_between_is_not_mixed_with(
    hub: Hub, pair: Pair, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = HfApi.model_info

    def ask_then_change(self: HfApi, *arguments: object, **options: object) -> object:
        answer = asked(self, *arguments, **options)
        hub.uploads.repositories[REPO].apply("main", "theirs", {"model-00001-of-00002.safetensors": b"theirs"}, [])
        return answer

    monkeypatch.setattr(HfApi, "model_info", ask_then_change)
    failed = push()
    assert "failed: someone else changed it in the meantime (412)" in failed.stderr
    assert on_hub(hub) == {"model-00001-of-00002.safetensors": b"theirs"}
