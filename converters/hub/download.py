"""Snapshots of repositories on the Hub, through huggingface-hub's cache."""

from pathlib import Path


def fetch_snapshot(
    repo_id: str, revision: str | None, token: str | None, patterns: list[str], main_file: str
) -> Path:
    """Fetch the files of a commit that match `patterns` and return the commit's folder in the cache.

    Args:
        repo_id, revision, token: the repository and how to access it.
        patterns: the files to fetch, as glob patterns.
        main_file: a file that locates the commit offline in a cache that another program filled.

    Raises the errors of huggingface_hub; see `converters.hub.errors.hub_errors`.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except IncompleteSnapshotError:
        # offline, with a cache that another program filled: it may lack files that are not needed
        found = try_to_load_from_cache(repo_id, main_file, revision=revision)
        if not isinstance(found, str):
            raise
        return Path(found).parent


def hide_progress_bars() -> None:
    """Show no progress bars of huggingface-hub: beside another bar they overwrite each other."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
