"""`peanut-serve key`: what it prints is a key that the file then lets in."""

import json
import re
from pathlib import Path

import pytest

from peanut_serve.cli.key_command import main
from peanut_serve.tenants.keys import Role
from peanut_serve.tenants.watched import WatchedKeys


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_the_entry_lets_the_key_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--variants", "math-*", "--variants", "gsm8k", "--requests-per-minute", "600", "--places", "8")
    entries, tokens = [], []
    for arguments in (("search", *limits), ("plain",), ("night", "--role", "read-only")):
        code, out, _ = made(capsys, *arguments)
        assert code == 0
        (token,) = re.findall(r"^peanut_\S+$", out, re.MULTILINE)
        tokens.append(token)
        entries.append(out.split("its entry for the keys file:\n\n")[1])
        assert token not in entries[-1]
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + "".join(entries))
    keys = WatchedKeys(file)
    search, plain, night = (keys.find(token.encode()) for token in tokens)
    assert search is not None
    assert (search.name, search.variants, search.requests_per_minute, search.places) == (
        "search", ("math-*", "gsm8k"), 600, 8
    )  # fmt: skip
    assert plain is not None
    assert not plain.is_restricted
    assert night is not None
    assert night.role is Role.READ_ONLY
    assert len({*tokens}) == 3
    assert all(len(token) > 45 for token in tokens)


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(made(capsys, "search", "--json")[1])
    assert set(found) == {"key", "entry"}
    assert found["entry"]["name"] == "search"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("a b",), "name: String should match pattern"),
        (("other",), "the name other stands for everybody"),
        (("a", "--places", "0"), "places: Input should be greater than 0"),
        (("a", "--role", "admin", "--places", "3"), "a key with the role admin has no places"),
    ],
)
def test_refusals(arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = made(capsys, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("peanut-serve key: ")
    assert reason in err
