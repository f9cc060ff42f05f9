"""Uploading a finished folder to the Hub: errors that can be found before the merge are; the upload is one commit."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

from converters.errors import HubError, OptionError
from converters.files.names import ADAPTER_CONFIG, INDEX_FILE, MANIFEST_NAME
from converters.hub.errors import explain, hub_exceptions
from converters.hub.names import is_hub_id
from converters.plans.merge import Plan

# files of an earlier push that would be loaded with, or instead of, those that are pushed now
_MODEL_FILES = ("*.safetensors", INDEX_FILE, ADAPTER_CONFIG)


@dataclass(frozen=True)
class Push:
    """Where a finished folder is to be uploaded; nowhere without a `repo_id`.

    Attributes:
        repo_id: `user/name` on the Hub.
        private: create a private repository.
        branch: branch to push to; by default `main`.
        token: Hub token; by default the one huggingface-hub finds (HF_TOKEN, `hf auth login`).

    Raises `OptionError` when the repo id is not valid, or missing.
    """

    repo_id: str | None
    private: bool = False
    branch: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        for name, given in (("private", self.private), ("branch", self.branch is not None)):
            if given and self.repo_id is None:
                raise OptionError(f"{name}= needs repo_id=")
        if self.repo_id is not None and not ("/" in self.repo_id and is_hub_id(self.repo_id)):
            raise OptionError(f"{self.repo_id} cannot be a repository on the Hub; expected user/name")

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Do everything but the upload, see `prepare_push`. Raises `OptionError` if the repository is an input."""
        if self.repo_id is None:
            return
        inputs = {plan.base.repo_id for plan in plans}
        inputs |= {weighted.adapter.repo_id for plan in plans for weighted in plan.adapters}
        if self.branch is None and self.repo_id.lower() in {repo_id.lower() for repo_id in inputs if repo_id}:
            raise OptionError(
                f"{self.repo_id} is an input of this merge; push to another repository, or give branch="
            )
        prepare_push(self.repo_id, private=self.private, revision=self.branch, token=self.token)

    def upload(self, folder: Path) -> str | None:
        """See `push_folder`."""
        if self.repo_id is None:
            return None
        return push_folder(folder, self.repo_id, revision=self.branch, token=self.token)


def prepare_push(
    repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> None:
    """Create the repository and the branch if they do not exist, and check that they may be written.

    Raises `HubError` when the upload would be refused, or would be public although `private` was asked for.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} is public on the Hub; make it private there, or leave out private=")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # create_repo accepts somebody else's repository; this uploads nothing, but checks the right to do so
        api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"#")], revision=revision)
    except hub_exceptions() as error:
        raise HubError(f"nothing can be pushed to {_at(repo_id, revision)}: {explain(error)}") from None


def push_folder(folder: Path, repo_id: str, *, revision: str | None = None, token: str | None = None) -> str:
    """Upload a folder in one commit: the Hub shows the old state or all of the new one; returns the URL.

    The same commit deletes weights, index and adapter config of an earlier push that the folder does not replace.
    `HfApi.upload_folder` is not used: since huggingface_hub 2 it makes several commits of many or large files.

    Raises `HubError` when the upload fails; then the Hub shows the old state, unless only its last response was lost.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=token)
        before = api.model_info(repo_id, revision=revision)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        names = {operation.path_in_repo for operation in added}
        stale = [file.rfilename for file in before.siblings or [] if _is_model_file(file.rfilename)]
        deleted = [CommitOperationDelete(name) for name in stale if name not in names]
        api.create_commit(
            repo_id,
            [*deleted, *added],
            commit_message=_commit_message(folder),
            revision=revision,
            parent_commit=before.sha,  # fails if somebody else pushed meanwhile, instead of mixing both
        )
    except hub_exceptions() as error:
        options = ["--revision", revision] if revision else []
        options += [part for pattern in _MODEL_FILES for part in ("--delete", pattern)]
        again = shlex.join(["hf", "upload", repo_id, str(folder), *options])
        raise HubError(
            f"{folder} is complete, but its upload to {_at(repo_id, revision)} failed: {explain(error)}. "
            f"To repeat only the upload: {again}"
        ) from None
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")


def _is_model_file(name: str) -> bool:
    """Whether a file of the repository may be deleted; files in its subfolders may not."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _MODEL_FILES)


def _at(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id


def _commit_message(folder: Path) -> str:
    """A summary of the manifest."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    base = manifest["base"]["repo_id"] or manifest["base"]["name"]
    adapters = " + ".join(adapter["name"] for adapter in manifest["adapters"])
    return f"{adapters} on {base}, by {manifest['generator']}"
