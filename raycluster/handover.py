"""A journal's files on object storage: from a job that ends before all is delivered to the next one, anywhere."""

from pathlib import Path

from pyarrow import fs

from ctrdist.storage import filesystem


class Handover:
    """Where the journals of a state on object storage wait while no job runs.

    Args:
        remote: URI of a folder.
        local: the folder of the journals of this machine.
    """

    def __init__(self, remote: str, local: Path) -> None:
        self.remote, self.local = remote, local
        self._filesystem, self._root = filesystem(remote)
        self._taken: list[str] = []

    def take(self) -> None:
        """Copy what waits to this machine. It stays where it is until it is delivered (`done`)."""
        self._taken = [info.path for info in self._files() if info.is_file]
        for path in self._taken:
            target = self.local / path.removeprefix(f"{self._root}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(path, str(target), source_filesystem=self._filesystem)

    def leave(self) -> None:
        """Copy what this machine's journals hold to where the next job finds it."""
        for path in self.local.rglob("*"):
            if path.is_file():
                target = f"{self._root}/{path.relative_to(self.local)}"
                self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
                fs.copy_files(str(path), target, destination_filesystem=self._filesystem)

    def done(self) -> None:
        """All that was taken is delivered: remove it there."""
        for path in self._taken:
            if self._filesystem.get_file_info(path).is_file:
                self._filesystem.delete_file(path)
        self._taken = []

    def _files(self) -> list[fs.FileInfo]:
        return self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True, recursive=True))
