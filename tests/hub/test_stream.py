"""`--stream`: merging from the Hub shard by shard, with a server on loopback."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import run
from support.hub.server import MIB, Hub, hub_settings, merge_from, serve_hub
from support.tiny_models import Pair, edit_config, save_adapter, tiny_llama

pytestmark = pytest.mark.slow  # commands that fetch dozens of shards over HTTP


@pytest.fixture
def pair(pair: Pair) -> Pair:
    """A base of many shards of 8 KB, or one tensor, each."""
    tiny_llama().from_pretrained(pair.base).save_pretrained(pair.base.with_name("sharded"), max_shard_size="8KB")
    edit_config(pair.adapter, base_model_name_or_path="org/model")
    return Pair(pair.base.with_name("sharded"), pair.adapter, pair.output)


@pytest.fixture
def hub(pair: Pair) -> Iterator[Hub]:
    with serve_hub({"org/model": pair.base}) as hub:
        yield hub


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def assets(pair: Pair) -> Path:
    return pair.output.with_name("cache-assets")


def stream(hub: Hub, pair: Pair, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return merge_from(hub, pair, "org/model", "--stream", *options, **environment)


def same_weights(pair: Pair, *options: str | Path) -> bool:
    """Whether the output equals that of merging the local folder; only the manifest differs in the base's source."""
    local = pair.output.with_name("local")
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", local, "--overwrite", *options)
    assert done.returncode == 0, done.stderr
    manifests = [json.loads((folder / "peanut_manifest.json").read_text()) for folder in (pair.output, local)]
    assert manifests[0]["base"]["fingerprint"] == manifests[1]["base"]["fingerprint"]
    assert manifests[0]["verified"] == manifests[1]["verified"]
    assert shards(pair.output) == shards(local)
    return all((pair.output / name).read_bytes() == (local / name).read_bytes() for name in shards(local))


def test_holds_two_shards_at_most(hub: Hub, pair: Pair) -> None:
    """When a shard is requested from the Hub, at most one other is on disk."""
    seen: list[list[str]] = []
    hub.on_download = lambda name: seen.append(shards(assets(pair))) if name.startswith("model-") else None
    done = stream(hub, pair, "--max-shard-size", "base")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = shards(pair.base)
    assert len(names) > 10
    assert [hub.downloads[name] for name in names] == [1] * len(names)
    assert len(seen) == len(names)
    assert max(map(len, seen)) <= 1
    assert shards(assets(pair)) == shards(pair.output.with_name("cache")) == []
    assert same_weights(pair, "--max-shard-size", "base")


def test_a_single_file_several_adapters_and_links(hub: Hub, pair: Pair, make_pair: Callable[..., Pair]) -> None:
    single = make_pair()
    hub.models["org/model"] = single.base
    other = pair.adapter.with_name("other")
    save_adapter(tiny_llama(), other, seed=7)
    edit_config(other, base_model_name_or_path="org/model")
    done = stream(hub, pair, "--adapter", str(other), "--each", "--share")
    assert done.returncode == 0, done.stderr
    assert hub.downloads["model.safetensors"] == 1
    assert sorted(path.name for path in pair.output.iterdir()) == sorted([pair.adapter.name, "other"])


def test_a_dry_run_fetches_no_weights(hub: Hub, pair: Pair) -> None:
    done = stream(hub, pair, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    assert json.loads(done.stdout)["tensors"]


def test_shards_in_the_cache_are_used_and_stay(hub: Hub, pair: Pair) -> None:
    assert merge_from(hub, pair, "org/model").returncode == 0
    cached = shards(pair.output.with_name("cache") / "models--org--model" / "snapshots")
    hub.downloads.clear()
    assert stream(hub, pair, "--overwrite").returncode == 0
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    assert shards(pair.output.with_name("cache") / "models--org--model" / "snapshots") == cached
    assert same_weights(pair)


def test_resume_fetches_only_what_is_not_done(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    names = shards(pair.base)
    hub.broken[names[6]] = [100] * 6
    broken = stream(hub, pair, "--resume", **no_waits)
    assert broken.returncode == 1
    assert broken.stderr.splitlines()[-1].startswith("peanut-merge: fetching org/model@"), broken.stderr
    assert "the Hub cannot be reached or closed the connection" in broken.stderr
    assert not pair.output.exists()
    hub.downloads.clear()
    hub.broken.clear()
    resumed = stream(hub, pair, "--resume", **no_waits)
    assert resumed.returncode == 0, resumed.stderr
    again = {name for name in hub.downloads if name.endswith(".safetensors")}
    assert set(names[6:]) <= again <= set(names[5:])
    assert same_weights(pair)
    hub.downloads.clear()
    assert json.loads(stream(hub, pair, "--resume").stdout)["taken_over"] > 0  # already complete: nothing to do
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]


def test_without_resume_a_failure_leaves_nothing(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    hub.broken[shards(pair.base)[6]] = [100] * 6
    assert stream(hub, pair, **no_waits).returncode == 1
    assert [path for path in assets(pair).rglob("*") if "model" in path.name] == []
    assert sorted(path.name for path in pair.output.parent.glob(".*staging*")) == []


def test_what_a_killed_run_left_is_removed(hub: Hub, pair: Pair) -> None:
    left = assets(pair) / "peanut-serve" / "streams" / "default" / "0" / "org--other--123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x" * MIB)
    assert stream(hub, pair).returncode == 0
    assert not left.exists()


def test_another_base_is_detected_before_anything_is_published(hub: Hub, pair: Pair) -> None:
    """The recorded fingerprint can only be compared after all shards have been read."""
    (pair.adapter / "peanut_base.json").write_text(json.dumps({"fingerprint": "sampled-sha256:" + "0" * 64}))
    refused = stream(hub, pair)
    assert refused.returncode == 1
    assert "the adapter was recorded on a base with fingerprint sampled-sha256:000" in refused.stderr
    assert not pair.output.exists()
    assert run("peanut-inspect", pair.adapter, "--base", pair.base, "--record-base").returncode == 0
    right = stream(hub, pair)
    assert right.returncode == 0, right.stderr


def test_a_file_that_does_not_match_its_header(hub: Hub, pair: Pair) -> None:
    """The file is replaced between reading its header and downloading it."""
    name = shards(pair.base)[3]
    path = pair.base / name

    def replace(asked: str) -> None:
        if asked == shards(pair.base)[0]:
            path.write_bytes(path.read_bytes()[:-8])

    hub.on_download = replace
    refused = stream(hub, pair)
    assert refused.returncode == 1
    assert name in refused.stderr
    assert not pair.output.exists()


def test_what_cannot_be_streamed(hub: Hub, pair: Pair) -> None:
    local = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "--stream")
    assert local.stderr.startswith(
        f"peanut-merge: --stream has no meaning for the local folder {pair.base}; expected"
    )
    itself = run("peanut-merge", "--base", "self", "--adapter", pair.adapter, "--stream")
    assert itself.stderr == "peanut-merge: --stream is for a base on the Hub, not for --base self\n"
    gone = merge_from(hub, pair, "org/none", "--stream")
    assert gone.stderr.startswith("peanut-merge: no folder 'org/none' here and no such model on the Hub")
    (pair.base / "model.safetensors.index.json").unlink()
    unweighted = stream(hub, pair)
    assert "expected safetensors weights" in unweighted.stderr
    assert hub_settings(hub, pair)["HF_ENDPOINT"] == hub.url
