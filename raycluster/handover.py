"""A journal's files on object storage: from a job that ends before all is delivered to the next one, anywhere."""

import shutil
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
        """Copy what waits to this machine. It stays where it is until it is delivered (`settle`)."""
        self._taken = [path for path in self._files(self._root, deep=False) if path.endswith(".jsonl")]
        for path in self._taken:
            target = self.local / Path(path).name
            if target.exists():  # another job on this machine has taken it
                continue
            for file in self._files(str(Path(path).with_suffix(".files"))):
                copy = self.local / Path(file).relative_to(self._root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(file, str(copy), source_filesystem=self._filesystem)
            self.local.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".new")
            fs.copy_files(path, str(partial), source_filesystem=self._filesystem)
            partial.rename(target)

    def settle(self, left: list[Path]) -> None:
        """Leave for the next job what is not delivered, and no longer what is.

        Args:
            left: the journals, of this job or taken by it, that are not delivered. They are here no longer then: a
                later job on this machine would deliver them after what came meanwhile.

        Raises:
            OSError: object storage is away; they stay here.
        """
        for path in left:
            files = path.with_suffix(".files")
            for file in [*(file for file in files.rglob("*") if file.is_file()), path]:  # who takes it finds its files
                target = f"{self._root}/{file.relative_to(self.local)}"
                self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
                fs.copy_files(str(file), target, destination_filesystem=self._filesystem)
            path.unlink()
            shutil.rmtree(files, ignore_errors=True)
        names = {path.name for path in left}
        for path in self._taken:
            if Path(path).name not in names:
                for file in [path, *self._files(str(Path(path).with_suffix(".files")))]:
                    if self._filesystem.get_file_info(file).is_file:
                        self._filesystem.delete_file(file)
        self._taken = []

    def _files(self, folder: str, deep: bool = True) -> list[str]:
        found = self._filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=deep))
        return [info.path for info in found if info.is_file]
