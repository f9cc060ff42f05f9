"""Regular expressions within a time limit: some would take years, and Python cannot stop a search."""

import asyncio
import json
import subprocess
import sys

_SECONDS = 5.0  # with the start of a process
_PROGRAM = "import json, re, sys; sys.exit(0 if re.search(*json.load(sys.stdin)) else 1)"


async def is_found(pattern: str, text: str) -> bool | None:
    """Whether a pattern is found in a text; None if that takes too long. It runs in a process that can be ended."""
    return await asyncio.to_thread(_search, pattern, text)


def _search(pattern: str, text: str) -> bool | None:
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, text]).encode(), timeout=_SECONDS, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode == 0
