"""The state as one file: what is exported comes back, and nothing else gets in."""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json

from converters.errors import NoSpaceError, OptionError, OutputExistsError
from peanut_serve.variants.backup.archive import LIST
from peanut_serve.variants.backup.checking import check_archive, check_state
from peanut_serve.variants.backup.exporting import export_state
from peanut_serve.variants.backup.importing import import_state
from peanut_serve.variants.state_folder import SCHEMA, VariantStore


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    """Two versions of `v1`, which is pinned, another name for it, and an active variant."""
    site = Site(pair, tmp_path)
    site.digest()
    site.change()
    site.digest()
    site.catalogue.pin("v1", True)
    site.catalogue.register("nice", "v1")
    site.catalogue.remember_active("nice")
    return site


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but its lock."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "lock"}


def test_there_and_back(site: Site, tmp_path: Path) -> None:
    archive = tmp_path / "state.tar"
    contents = export_state(site.state, archive)  # while its server runs
    assert contents.thetas == site.thetas()
    assert archive.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "elsewhere" / "state"
    assert import_state(archive, other) == (contents, None)
    assert snapshot(other) == snapshot(site.state)
    assert check_state(other).problems == []
    digest, first = site.saved()["v1"]["digest"], site.saved()["v1"]["previous"][0]
    site.state = other
    records = site.start().records
    assert (records.active, records.variants["v1"].pinned) == ("nice", True)
    assert site.digest() == digest
    variant = asyncio.run(site.catalogue.rollback("v1", None, site.preparing))
    assert variant.record.digest == first


def test_only_what_the_records_name_is_exported(site: Site, tmp_path: Path) -> None:
    """No lock, audit log, half-copied θ, nor one that a start removes."""
    for name in ("theta/.new-x/theta.safetensors", f"theta/{'0' * 40}/theta.safetensors", "audit.jsonl"):
        (site.state / name).parent.mkdir(exist_ok=True)
        (site.state / name).write_bytes(b"secret")
    contents = export_state(site.state, tmp_path / "state.tar")
    assert contents.thetas == {site.saved()["v1"]["digest"], *site.saved()["v1"]["previous"]}
    assert b"secret" not in (tmp_path / "state.tar").read_bytes()


def test_what_cannot_be_exported(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "state.tar"
    with pytest.raises(OptionError, match="nothing has no variants.json; check --state"):
        export_state(tmp_path / "nothing", archive)
    assert not (tmp_path / "nothing").exists()
    export_state(site.state, archive)
    with pytest.raises(OutputExistsError, match="exists; choose another output, or pass --overwrite"):
        export_state(site.state, archive)
    export_state(site.state, archive, overwrite=True)
    before = archive.read_bytes()
    read = Path.read_bytes

    def busy(path: Path) -> bytes:
        if path.name == "variants.json":
            edit = json.loads(path.read_text())
            path.write_text(json.dumps({**edit, "active": f"{edit['active']}+"}))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", busy)
        with pytest.raises(OptionError, match="the server changes .* all the time; try again, or stop it"):
            export_state(site.state, archive, overwrite=True)
    assert archive.read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_state_that_is_there(site: Site, tmp_path: Path) -> None:
    """It is replaced only if that is asked for, and kept; that of another base is not."""
    archive = tmp_path / "state.tar"
    export_state(site.state, archive)
    with pytest.raises(OptionError, match="another server uses"):
        import_state(archive, site.state)
    other = tmp_path / "other"
    import_state(archive, other)
    edit_json(other / "variants.json", active="v1")
    later = snapshot(other)
    with pytest.raises(OptionError, match="has the records of 2 variants; pass --replace to replace them"):
        import_state(archive, other)
    assert snapshot(other) == later
    _, kept = import_state(archive, other, replace=True)
    assert kept is not None
    assert json.loads((other / "variants.json").read_text())["active"] == "nice"
    import_state(kept, other, replace=True)
    assert json.loads((other / "variants.json").read_text())["active"] == "v1"
    edit_json(other / "variants.json", base="f" * 40)
    with pytest.raises(OptionError, match="has the state of another base .* give another --state"):
        import_state(archive, other, replace=True)


def test_a_failed_import_changes_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call to the file system fails; and the next import works."""
    archive, other = tmp_path / "state.tar", tmp_path / "other"
    export_state(site.state, archive)
    import_state(archive, other)
    edit_json(other / "variants.json", active="v1")
    shutil.rmtree(other / "theta" / site.saved()["v1"]["digest"])
    records = (other / "variants.json").read_bytes()
    synced, left = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        synced(descriptor)

    failures = 0
    for count in range(100):
        left = count
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                import_state(archive, other, replace=True)
                break
            except OSError:
                failures += 1
        if (now := (other / "variants.json").read_bytes()) != records:  # only its folder was not synced
            assert json.loads(now)["active"] == "nice"
        assert [path.name for path in other.glob(".*")] == []
        assert set(site.saved()["v1"]["previous"]) <= {path.name for path in (other / "theta").iterdir()}
    assert failures >= 3
    assert check_state(other).problems == []
    assert json.loads((other / "variants.json").read_text())["active"] == "nice"


def test_a_failed_import_leaves_no_new_folder(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "state.tar"
    export_state(site.state, archive)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(NoSpaceError, match="needs .* MiB for the import, 0 MiB are free"):
        import_state(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()


Edit = Callable[[dict[str, tarfile.TarInfo], dict[str, bytes]], None]


def rewritten(archive: Path, edit: Edit) -> Path:
    """A copy of an archive whose members and their contents were changed."""
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar}
        data = {name: tar.extractfile(member).read() for name, member in members.items()}  # type: ignore[union-attr]
    edit(members, data)
    into = archive.with_name("edited.tar")
    with tarfile.open(into, "w:", format=tarfile.GNU_FORMAT) as tar:
        for name, member in members.items():
            member.size = len(data[name]) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data[name]))
    return into


def listed(data: dict[str, bytes], **changes: object) -> None:
    data[LIST] = json.dumps({**json.loads(data[LIST]), **changes}).encode()


def with_file(name: str, kind: bytes = tarfile.REGTYPE) -> Edit:
    """A file that is in the list as well."""

    def edit(members: dict[str, tarfile.TarInfo], data: dict[str, bytes]) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        members[name], data[name] = member, b"x"
        files = json.loads(data[LIST])["files"]
        listed(data, files={**files, name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})

    return edit


def without(part: str) -> Edit:
    def edit(members: dict[str, tarfile.TarInfo], data: dict[str, bytes]) -> None:
        del members[next(name for name in members if part in name)]

    return edit


def damaged(members: dict[str, tarfile.TarInfo], data: dict[str, bytes]) -> None:
    name = next(name for name in data if name.endswith(".safetensors"))
    data[name] = data[name][:-1] + bytes([data[name][-1] ^ 1])


HOSTILE = {
    "a path above": (with_file("../evil.json"), "lists '../evil.json', which is not a file of a state folder"),
    "an absolute path": (with_file("/tmp/evil.json"), "lists '/tmp/evil.json', which"),
    "a path out of θ": (with_file(f"theta/{'a' * 40}/../../evil.json"), "which is not a file of a state folder"),
    "a hidden folder": (with_file("theta/.ssh/key.json"), "which is not a file of a state folder"),
    "another file": (with_file(f"theta/{'a' * 40}/run.py"), "which is not a file of a state folder"),
    "a link": (with_file(f"theta/{'a' * 40}/x.json", tarfile.SYMTYPE), "is not a regular file"),
    "a hard link": (with_file(f"theta/{'a' * 40}/x.json", tarfile.LNKTYPE), "is not a regular file"),
    "a device": (with_file(f"theta/{'a' * 40}/x.json", tarfile.CHRTYPE), "is not a regular file"),
    "θ that no record names": (with_file(f"theta/{'a' * 40}/x.json"), "a version aaaaaaaaaaaa that no record names"),
    "no records": (without("variants.json"), "variants.json is missing"),
    "a missing file": (without("safetensors"), "is missing; export it again"),
    "no list": (without(LIST), f"its first member is not {LIST}"),
    "a flipped bit": (damaged, "the hash of theta/.* is not the one in its list"),
    "a newer schema": (lambda _, data: listed(data, schema_version=SCHEMA + 1), "written by a newer peanut-serve"),
    "a newer format": (lambda _, data: listed(data, format=2, new=1), "format 2, expected at most 1: it was written"),
    "an odd list": (lambda _, data: listed(data, base=3), "its list is not one"),
    "another base": (lambda _, data: listed(data, base="f"), "its list and its records name different bases"),
}


def test_what_is_not_imported(site: Site, tmp_path: Path) -> None:
    archive, other = tmp_path / "state.tar", tmp_path / "other"
    export_state(site.state, archive)
    before = {path for path in tmp_path.rglob("*") if path.name != "edited.tar"}
    for case, (edit, message) in HOSTILE.items():
        edited = rewritten(archive, edit)
        with pytest.raises(OptionError) as refused:
            import_state(edited, other)
        assert re.search(message, str(refused.value)), case
        assert not other.exists(), case
        assert {path for path in tmp_path.rglob("*") if path.name != "edited.tar"} == before, case


def test_files_that_are_no_archive(site: Site, tmp_path: Path) -> None:
    archive = tmp_path / "state.tar"
    export_state(site.state, archive)
    whole = archive.read_bytes()
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 40  # a header that tarfile would read into memory
    for data in (b"", b"x" * 5000, whole[:700], whole[: len(whole) // 2], huge.tobuf() + whole):
        archive.write_bytes(data)
        with pytest.raises(OptionError, match=r"is not an archive|is damaged"):
            check_archive(archive)


def test_what_a_check_finds(site: Site, tmp_path: Path) -> None:
    report = check_state(site.state, roots=[str(site.tasks)])
    assert (report.problems, report.in_use, report.schema_version) == ([], True, SCHEMA)
    assert sorted(report.usable) == sorted(report.versions["v1"])
    copy = tmp_path / "copy"
    shutil.copytree(site.state, copy)
    assert not check_state(copy).in_use
    assert "are those of another base" in check_state(copy, base="f" * 40).problems[0]
    current, previous = report.versions["v1"]
    weights = copy / "theta" / current / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8] + bytes(8))
    assert f"version {current[:12]} is damaged" in check_state(copy).problems[0]
    weights.write_bytes(b"")
    assert f"version {current[:12]} cannot be opened" in check_state(copy).problems[0]
    weights.write_bytes(whole)
    shutil.rmtree(copy / "theta" / previous)
    assert check_state(copy).problems == []  # it may have been a merged folder
    found = check_state(copy, roots=[str(site.tasks)]).problems
    assert [problem.split(":")[0] for problem in found] == ["v1"]
    assert "cannot be rolled back to" in found[0]
    assert "requests for it get a 404" in check_state(copy, roots=[str(site.more)]).problems[0]
    (copy / "theta" / ("0" * 40)).mkdir()
    assert "theta has 1 folders that no record names" in " ".join(check_state(copy).notes)


def test_records_of_an_older_schema(site: Site, tmp_path: Path) -> None:
    """The first states had the number 1, and those before that none; every field that came later has a default."""
    other = tmp_path / "other"
    shutil.copytree(site.state, other)
    value = json.loads((other / "variants.json").read_text())
    del value["schema_version"]
    for record in value["variants"].values():
        for later in record.keys() - {"source", "digest", "previous", "seen", "pinned", "hidden"}:
            del record[later]
    (other / "variants.json").write_text(json.dumps(value))
    export_state(other, tmp_path / "state.tar")
    import_state(tmp_path / "state.tar", tmp_path / "new")
    migrated = json.loads((tmp_path / "new" / "variants.json").read_text())
    assert migrated == {**json.loads((site.state / "variants.json").read_text()), "schema_version": SCHEMA}
    store = VariantStore(other)
    assert store.load(value["base"]).schema_version == SCHEMA
    store.close()
