"""Streaming: the shards of a base on the Hub are fetched one after another and removed after use."""

import fcntl
import os
import shutil
import threading
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from converters.errors import CheckpointError
from converters.files.header import TensorInfo, list_tensors, read_header
from converters.hub.errors import hub_errors


class ShardStream:
    """The weights of one commit on the Hub, with at most two files on disk at a time.

    The files are stored in a separate folder among huggingface-hub's assets, which this process locks. Files left by
    a killed process are reused or removed by the next one. Files in huggingface-hub's cache are used from there and
    kept.

    Args:
        repo_id: the Hub id of the model.
        commit: the commit on the Hub, 40 hex digits.
        token: as for `find_base`.
    """

    def __init__(self, repo_id: str, commit: str, token: str | None) -> None:
        from huggingface_hub import cached_assets_path

        self._repo_id, self._commit, self._token = repo_id, commit, token
        root, lock = _claim(cached_assets_path(library_name="peanut-serve", namespace="streams"))
        weakref.finalize(self, os.close, lock)
        self.folder = root / f"{repo_id.replace('/', '--')}--{commit}"
        for other in root.iterdir():
            if other != self.folder:
                shutil.rmtree(other)
        self._sizes: dict[Path, int] = {}
        self._headers: dict[Path, list[TensorInfo]] = {}

    def has(self, name: str) -> bool:
        """Whether the commit contains a file of this name."""
        return name in self._names

    @cached_property
    def _names(self) -> set[str]:
        from huggingface_hub import HfApi

        with hub_errors(self._repo_id, self._commit):
            return set(HfApi(token=self._token).list_repo_files(self._repo_id, revision=self._commit))

    def header(self, name: str) -> tuple[list[TensorInfo], dict[str, str]]:
        """As `read_header`, without fetching the file; `TensorInfo.file` is the path it will be fetched to."""
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import SafetensorsParsingError

        cached = try_to_load_from_cache(self._repo_id, name, revision=self._commit)
        if isinstance(cached, str):
            return read_header(Path(cached))
        file = self.folder / name
        try:
            with hub_errors(self._repo_id, self._commit):
                url = hf_hub_url(self._repo_id, name, revision=self._commit)
                size = get_hf_file_metadata(url, token=self._token).size
                api = HfApi(token=self._token)
                found = api.parse_safetensors_file_metadata(self._repo_id, name, revision=self._commit)
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{self._repo_id}: {name} is not a safetensors file ({error})") from None
        entries = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }
        end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        self._sizes[file] = size or end
        self._headers[file] = list_tensors(entries, file, self._sizes[file] - end)
        return self._headers[file], dict(found.metadata)

    @property
    def most_bytes(self) -> int:
        """The maximum disk usage of two files."""
        return sum(sorted(self._sizes.values())[-2:])

    def fetch(self, files: Sequence[Path], keep: bool) -> Generator[Path]:
        """Fetch `files` in order. Each is available until the next is requested, which is fetched in the background.

        If the iteration ends early, the files on disk are removed, unless `keep` is set so that a run can be resumed.

        Raises:
            HubError: the download failed.
            CheckpointError: a file does not match the header that was read from the Hub.
        """
        for left in set(self.folder.glob("*.safetensors")) - set(files[:2]):
            left.unlink()
        done = False
        try:
            coming = [self._begin(file) for file in files[:1]]
            for file, following in zip_longest(files, files[1:]):
                coming.pop().result()
                self._check(file)
                if following is not None:
                    coming.append(self._begin(following))
                yield file
                if file in self._headers:
                    file.unlink()
            done = True
        finally:
            if done or not keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, file: Path) -> "Future[None]":
        """Fetch a file on a daemon thread, which does not keep the process alive."""
        done: Future[None] = Future()

        def work() -> None:
            """Download the file, and report the outcome to `done`."""
            try:
                self._download(file)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=work, daemon=True).start()
        return done

    def _download(self, file: Path) -> None:
        if file not in self._headers:
            return  # in huggingface-hub's cache
        from huggingface_hub import hf_hub_download

        with hub_errors(self._repo_id, self._commit):
            hf_hub_download(self._repo_id, file.name, revision=self._commit, token=self._token, local_dir=self.folder)

    def _check(self, file: Path) -> None:
        expected = self._headers.get(file)
        if expected is not None and read_header(file)[0] != expected:
            raise CheckpointError(
                f"{self._repo_id}: {file.name} does not match the header read from the Hub earlier; try again"
            )


def _claim(root: Path) -> tuple[Path, int]:
    """Claim a folder below `root` that no other process uses. Returns it and its lock."""
    number = -1
    while True:
        number += 1
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return folder, lock
