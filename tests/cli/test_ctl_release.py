"""`peanut-serve ctl release`, against an admin API on a real socket."""

import json
from collections.abc import Callable, Iterator

import pytest
from support.server.admin import KEY, FakeControl, serving_app
from support.server.releases import NEW, OLD, FakeReleases

from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.releases.routes import add_releases
from peanut_serve.releases.schema import CanaryStatus, Weighing
from peanut_serve.web.admin import admin_app

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReleases]:
    app, found = admin_app(FakeControl(), KEY), FakeReleases()
    add_releases(app, found)
    with serving_app(app) as url:
        monkeypatch.setenv("PEANUT_ADMIN_URL", url)
        monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)
        yield found


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs the command; returns its exit code and what it printed."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            ctl_command.main(["release", *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_the_changes(ctl: Ctl, releases: FakeReleases) -> None:
    assert ctl("hold", "gsm8k")[1] == "gsm8k: held\n"
    text = f"gsm8k: staged, digest {NEW}, 10 % of the requests, canary passed\n"
    for arguments in (
        ("stage", "gsm8k", "--source", "gsm8k-2026-12"),
        ("check", "gsm8k"),
        ("weight", "gsm8k", "10", "--max-error-rate", "0.2", "--min-requests", "50", "--force"),
        ("promote", "gsm8k"),
        ("rollback", "gsm8k", "--reason", "wrong units"),
    ):
        assert ctl(*arguments) == (0, text, ""), arguments
    assert ctl("stage", "user/release")[0] == 0
    assert ctl("stage", "gsm8k", "--digest", NEW)[0] == 0
    assert releases.calls == [
        ("hold", "gsm8k"),
        ("stage", "gsm8k", "gsm8k-2026-12"),
        ("check", "gsm8k"),
        ("weigh", "gsm8k", Weighing(weight=10, max_error_rate=0.2, min_requests=50, force=True)),
        ("promote", "gsm8k", False),
        ("rollback", "gsm8k", "wrong units"),
        ("stage", "user/release", None),
        ("stage", "gsm8k", None, NEW),
    ]


def test_list_and_show(ctl: Ctl, releases: FakeReleases) -> None:
    header, row = ctl("list")[1].splitlines()
    assert header.split() == ["NAME", "STATE", "WEIGHT", "DIGEST", "REPLACES", "CANARY", "FAILED"]
    assert row.split() == ["gsm8k", "staged", "10", "%", NEW[:12], OLD[:12], "passed", "1", "of", "40"]
    assert json.loads(ctl("list", "--json")[1]) == [releases.release("gsm8k").model_dump(mode="json")]
    code, out, err = ctl("show", "gsm8k")
    assert (code, err) == (0, "")
    assert "'6 times 7?' -> '42': passed" in out
    assert f"2025-01-02T00:00:00+00:00 stage {NEW[:12]}: [odd]" in out
    assert json.loads(ctl("show", "gsm8k", "--json")[1])["watched"] == 40


@pytest.mark.parametrize("verb", ["stage", "check"])
def test_a_failed_canary_is_an_error(ctl: Ctl, releases: FakeReleases, verb: str) -> None:
    """So that a pipeline stops there."""
    releases.canary = [CanaryStatus(prompt="6 times 7?", answer="43", problems=["'42' is not in the answer"])]
    code, out, err = ctl(verb, "gsm8k")
    assert (code, out) == (1, f"gsm8k: staged, digest {NEW}, 10 % of the requests, canary 1 of 1 failed\n")
    assert "1 of 1 canaries of gsm8k failed: '6 times 7?': '42' is not in the answer; it stays staged" in err
    code, out, err = ctl("promote", "gsm8k")
    assert (code, out, err) == (1, "", "peanut-serve ctl: gsm8k has not passed its canary set\n")
    assert ctl("promote", "gsm8k", "--force")[0] == 0


def test_refusals(ctl: Ctl, releases: FakeReleases) -> None:
    code, out, err = ctl("show", "none")
    assert (code, out, err) == (1, "", "peanut-serve ctl: none has no release; stage a version of it\n")
    assert ctl("weight", "gsm8k", "101")[0] == 2
    assert ctl("stage", "gsm8k", "--digest", NEW[:12])[2] == (
        f"peanut-serve ctl: --digest is {NEW[:12]}; expected the 40 hexadecimal digits that peanut-serve ctl show "
        "prints\n"
    )
    assert releases.calls == []
