"""Failing and interrupted downloads, from a Hub on loopback."""

from collections.abc import Callable, Iterator

import pytest
from support.commands import run
from support.hub.server import MIB, Hub, merge_from, serve_hub
from support.tiny_models import Pair, tiny_llama

pytestmark = pytest.mark.slow  # commands that download over HTTP

MODEL = "model.safetensors"
CHUNK = 10 * MIB  # huggingface_hub writes in chunks of this size, and resumes at a multiple of it


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """A base of a few chunks, and an adapter for it."""
    return make_pair(tiny_llama(vocab_size=100_000))


@pytest.fixture
def hub(pair: Pair) -> Iterator[Hub]:
    with serve_hub({"org/model": pair.base}) as hub:
        yield hub


def test_a_broken_download_resumes_where_it_broke(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    size = (pair.base / MODEL).stat().st_size
    assert size > 2 * CHUNK
    hub.broken[MODEL] = [11 * MIB, 10 * MIB + 5, 0]
    done = merge_from(hub, pair, "org/model", "--force-base", **no_waits)
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [(MODEL, CHUNK), (MODEL, 2 * CHUNK), (MODEL, 2 * CHUNK)]
    assert hub.sent[MODEL] == size + MIB + 5  # only the incomplete chunk was sent twice
    local = pair.output.with_name("local")
    assert run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", local).returncode == 0
    assert (pair.output / MODEL).read_bytes() == (local / MODEL).read_bytes()


def test_a_connection_that_breaks_for_good(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    hub.broken[MODEL] = [0] * 6
    refused = merge_from(hub, pair, "org/model", "--force-base", **no_waits)
    assert refused.returncode == 1
    message = refused.stderr.splitlines()[-1]
    assert message.startswith(
        "peanut-merge: fetching org/model from the Hub failed: the Hub cannot be reached or closed"
    )
    assert "Traceback" not in refused.stderr
    hub.downloads.clear()
    assert merge_from(hub, pair, "org/model", "--force-base", **no_waits).returncode == 0
    assert set(hub.downloads) == {MODEL}  # the other files were complete


def test_a_rate_limit_that_passes_is_waited_for(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    hub.limited["/resolve/"] = 3
    done = merge_from(hub, pair, "org/model", "--force-base", **no_waits)
    assert (done.returncode, hub.limited["/resolve/"]) == (0, 0), done.stderr


def test_what_a_hub_refuses(hub: Hub, pair: Pair, no_waits: dict[str, str]) -> None:
    def refused(repo: str, *options: str) -> str:
        done = merge_from(hub, pair, repo, "--force-base", *options, **no_waits)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        return done.stderr.strip().removeprefix("peanut-merge: ")

    assert refused("org/model", "--token", "hf_old") == (
        "fetching org/model from the Hub failed: the Hub rejected this token (401); pass --token, set HF_TOKEN, "
        "or log in: hf auth login"
    )
    assert refused("org/none").startswith("no folder 'org/none' here and no such model on the Hub; check the name")
    hub.limited["/api/models/org/model"] = 99
    assert refused("org/model").endswith(
        "nor available from the Hub: the rate limit of the Hub was reached (429); try again in 55 s; "
        "or pass --token, set HF_TOKEN, or log in: hf auth login"
    )
    hub.private["org/model"] = "hf_mine"
    assert refused("org/model", "--token", "hf_mine").endswith("was reached (429); try again in 55 s")
