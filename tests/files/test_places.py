"""Outputs in folders that are there already: empty ones, mount points, long names, folders without rights."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from converters.errors import CheckpointError, OutputError, OutputExistsError
from converters.files import inside, places
from converters.files.header import read_header
from converters.files.places import Place, find_place
from converters.files.staging import check_output, check_space, staged

CONTENT = {"config.json": "new", "peanut_manifest.json": "new", "1_Pooling/config.json": "new"}


def fill(folder: Path, text: str = "new") -> None:
    for name in CONTENT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(name="mount")
def _mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mount point that nothing can be renamed to: a real one for root, else one that the system only reports."""
    folder = tmp_path / "mount"
    folder.mkdir()
    if (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
    ):
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)
        return
    listed = tmp_path / "mountinfo"
    listed.write_text(f"36 35 98:0 /mnt1 {folder} rw,noatime master:1 - ext3 /dev/root rw\n")
    monkeypatch.setattr(places, "_MOUNTS", listed)
    rename = Path.rename

    def busy(source: Path, target: Path) -> Path:
        if folder in (source, target):
            raise OSError(16, "Device or resource busy", str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", busy)
    yield folder


def test_a_mount_point_is_filled_and_refilled(mount: Path) -> None:
    (mount / "lost+found").mkdir()
    before = mount.stat().st_ino
    check_space({mount: 1})
    assert find_place(mount, overwrite=False) is Place.FILL
    with staged(mount, overwrite=False) as staging:
        fill(staging)
        assert not (mount / "config.json").exists()
    assert content(mount) == CONTENT
    with pytest.raises(OutputExistsError, match="exists; choose another output"):
        check_output(mount, overwrite=False)
    assert find_place(mount, overwrite=True) is Place.REFILL
    (mount / "mine.txt").write_text("x")
    with staged(mount, overwrite=True) as staging:
        fill(staging, "newer")
    assert content(mount) == dict.fromkeys(CONTENT, "newer")
    assert mount.stat().st_ino == before


def test_a_bind_mount_of_the_same_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.path.ismount does not see it; what has a space in its name, the kernel escapes."""
    folder = tmp_path / "my out"
    folder.mkdir()
    assert not places.is_mount(folder)
    monkeypatch.setattr(places, "_MOUNTS", tmp_path / "mountinfo")
    escaped = str(folder).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(f"36 35 98:0 /mnt1 {escaped} rw,noatime - ext3 /dev/root rw\n")
    assert places.is_mount(folder)


def test_a_failed_run_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "out", overwrite=False) as staging:
            fill(staging)
            raise OSError("disk on fire")

    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="disk on fire"):
        fail()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("moves", range(7))
def test_moving_is_undone_or_never_looks_like_a_model(
    mount: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Three entries are moved away, and three are moved out: whichever of these is the last."""
    with staged(mount, overwrite=False) as staging:
        fill(staging, "old")
    copy = mount.with_name("copy")
    move, count = inside._move, iter(range(99))

    class Stop(BaseException):
        pass

    def limited(source: Path, target: Path, done: list[tuple[Path, Path]]) -> None:
        if next(count) == moves:
            shutil.copytree(mount, copy)  # what a killed run would leave
            raise Stop
        move(source, target, done)

    with monkeypatch.context() as patch:
        patch.setattr(inside, "_move", limited)
        try:
            with staged(mount, overwrite=True) as staging:
                fill(staging)
        except Stop:
            assert content(mount) == dict.fromkeys(CONTENT, "old")
        else:
            assert moves == 6
            return
    if moves:  # the config went first, and comes last
        assert not (copy / "config.json").exists()
        assert find_place(copy, overwrite=False) is Place.FILL
    else:
        with pytest.raises(OutputExistsError):
            find_place(copy, overwrite=False)
    with staged(copy, overwrite=True) as staging:
        fill(staging, "again")
    assert content(copy) == dict.fromkeys(CONTENT, "again")


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out", overwrite=False) as staging:
            fill(staging)
            (tmp_path / "out" / "thesis.tex").write_text("years")

    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match=r"thesis.tex appeared in .*out while it was being written"):
        write()
    assert content(tmp_path / "out") == {"thesis.tex": "years"}


@pytest.mark.parametrize("size", [240, 255])
@pytest.mark.parametrize("letter", ["x", "ä"])
def test_long_names(tmp_path: Path, size: int, letter: str) -> None:
    name = letter * (size // len(letter.encode()))
    for text in ("new", "newer"):
        with staged(tmp_path / name, overwrite=True) as staging:
            fill(staging, text)
    assert content(tmp_path / name) == dict.fromkeys(CONTENT, "newer")
    with pytest.raises(OutputError, match=r"has 256 bytes, but the name of a file or folder has at most 255"):
        check_output(tmp_path / ("x" * 256), overwrite=False)


def as_nobody(function: Callable[[], None]) -> str:
    """The message of the error that a function raises for a user without rights; root has all of them."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function()
            message = "no error"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


@pytest.fixture(name="open_folder")
def _open_folder(tmp_path: Path) -> Path:
    """A folder that everybody can get to."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path(folder.anchor):
            folder.chmod(folder.stat().st_mode | 0o011)
    return tmp_path


def test_a_file_without_rights_is_not_called_truncated(open_folder: Path) -> None:
    file = open_folder / "model.safetensors"
    file.write_bytes(b"whatever")
    file.chmod(0)
    message = as_nobody(lambda: read_header(file) and None)
    assert message.startswith("CheckpointError")
    assert "cannot be read (Permission denied)" in message
    assert "truncated" not in message
    file.chmod(0o644)
    with pytest.raises(CheckpointError, match="may be truncated"):
        read_header(file)


def test_a_place_without_rights_is_refused_before_the_work(open_folder: Path) -> None:
    folder = open_folder / "read-only"
    folder.mkdir(mode=0o555)
    for output in (folder, folder / "out", folder / "deep" / "out"):
        message = as_nobody(lambda output=output: check_output(output, overwrite=False))  # type: ignore[misc]
        assert "read-only is read-only for this user" in message, output
    (open_folder / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file"):
        check_output(open_folder / "file" / "out", overwrite=False)


def test_an_output_in_a_folder_that_belongs_to_others(open_folder: Path) -> None:
    """Only the folder itself may be written, as in a container."""
    parent = open_folder / "theirs"
    (parent / "out").mkdir(parents=True)
    (parent / "out").chmod(0o777)
    parent.chmod(0o555)

    def write() -> None:
        for _ in range(2):
            with staged(parent / "out", overwrite=True) as staging:
                fill(staging)

    message = as_nobody(write)
    assert message == "no error"
    assert content(parent / "out") == CONTENT
