"""Which code runs."""

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@lru_cache(maxsize=1)
def code_version() -> str:
    """The commit of this code, with `-dirty` where files differ from it; without git, the version of the package."""
    here = Path(__file__)

    def git(*command: str) -> str:
        line = ["git", "-C", str(here.parent), *command]
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else the repository is somebody else's
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return version("ctrdist")
    except PackageNotFoundError:  # a submitted working folder is not installed
        return "unknown"
