"""The state of a pipeline: outputs that exist whole or not at all, in a local folder or on object storage.

An output is written to a folder of its own that nobody has used before; one small manifest object, written last,
makes it exist. Readers see manifests only, so a process may die at any time and leave nothing half-written in sight.
"""

import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from ctrdist.errors import UserError

if TYPE_CHECKING:
    from ctrdist.group import Group


_USER = re.compile(r"//([^/@:\s]*:(?!\d+/)\S*@|[^/@\s]+@)")
_SECRETS = re.compile(r"((?:password|passwd|pwd|token|secret\w*|access_key)=)[^&\s]*", re.IGNORECASE)


def masked(text: str) -> str:
    """Text as it may be shown: addresses in it have no user and password, nor secrets among their options."""
    return _SECRETS.sub(r"\1***", _USER.sub("//***@", text))


def filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or a URI (`s3://...`, `gs://...`, `hdfs://...`), and the path within it."""
    if "://" in str(uri):
        try:
            return fs.FileSystem.from_uri(str(uri))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{uri}: cannot be opened: {str(error).splitlines()[0]}") from None
    return fs.LocalFileSystem(), os.path.abspath(uri)


def list_parquet(where: str) -> tuple[fs.FileSystem, str, list[str]]:
    """The Parquet files that a path or URI names, sorted, and their filesystem and common folder: all those under a
    folder but what begins with `_` or `.`, those that fit a local pattern, or one file."""
    filesystem_, root = filesystem(where)
    if "://" not in where and glob.has_magic(root):
        paths = sorted(path for path in glob.glob(root, recursive=True) if path.endswith(".parquet"))
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), Path(root).parts)
        return filesystem_, str(Path(*plain)), paths
    if filesystem_.get_file_info(root).type == fs.FileType.File:
        return filesystem_, str(Path(root).parent), [root]
    found = filesystem_.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    inner = {info.path: Path(info.path).relative_to(root).parts for info in found if info.type == fs.FileType.File}
    shown = [path for path, parts in inner.items() if not any(part.startswith(("_", ".")) for part in parts)]
    return filesystem_, root, sorted(path for path in shown if path.endswith(".parquet"))


@contextmanager
def write_whole(uri: str) -> Iterator[Path]:
    """A local path to write a file to; it stands at `uri`, a path or URI, when the block ends, and not if it fails."""
    filesystem_, target = filesystem(uri)
    local = isinstance(filesystem_, fs.LocalFileSystem)
    folder, name = Path(target).parent, Path(target).name
    filesystem_.create_dir(str(folder), recursive=True)
    for left in folder.glob(f".{glob.escape(name)}.*") if local else ():  # of a process that died
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder if local else None, prefix=f".{name}.") as partial:
        path = Path(partial) / name
        yield path
        if local:
            os.replace(path, target)
        else:
            fs.copy_files(str(path), target, destination_filesystem=filesystem_)


FORMAT = 2
"""Version of what outputs hold and how it is made; with another one, nothing that is there counts as done."""


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of anything that JSON can write, and of `FORMAT`; the same in every process."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What makes an output exist.

    Args:
        name: the output's name within the state.
        folder: where its files lie, relative to the state.
        inputs: fingerprint of what it was made from.
        files: bytes and SHA-256 of each file, by its path within the folder.
        facts: what its maker wants to be known without opening it (row counts, dates).
    """

    name: str
    folder: str
    inputs: str
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.name, self.files)


class State:
    """A state folder. Cheap to make and to pickle; any process of a job may hold one.

    Args:
        uri: a local path, or a URI of a filesystem that pyarrow opens.
        cache: local folder for copies of remote outputs; one in each process' own folder of temporary files if None.
    """

    def __init__(self, uri: str | Path, cache: str | Path | None = None) -> None:
        self.uri = str(uri)
        self._cache = cache

    @property
    def cache(self) -> Path:
        """Local folder for copies of remote outputs."""
        return Path(self._cache or Path(tempfile.gettempdir()) / "ctrdist-cache")

    @property
    def is_local(self) -> bool:
        """Whether the state lies on a filesystem of this machine."""
        return "://" not in self.uri or self.uri.startswith("file://")

    def path(self, name: str) -> str:
        """The full path or URI of something in the state, for messages and links."""
        return f"{self.uri.rstrip('/')}/{name}"

    def find(self, name: str, inputs: str | None = None) -> Manifest | None:
        """The manifest of output `name`; None if it does not exist or was made from other `inputs`."""
        filesystem_, root = filesystem(self.uri)
        path = f"{root}/{name}.json"
        if filesystem_.get_file_info(path).type != fs.FileType.File:
            return None
        with filesystem_.open_input_stream(path) as stream:
            manifest = Manifest(**json.loads(stream.read()))
        return manifest if inputs in (None, manifest.inputs) else None

    def names(self, under: str) -> list[str]:
        """Names of the outputs directly in folder `under`, sorted."""
        filesystem_, root = filesystem(self.uri)
        listing = filesystem_.get_file_info(fs.FileSelector(f"{root}/{under}", allow_not_found=True))
        return sorted(f"{under}/{info.base_name[:-5]}" for info in listing if info.base_name.endswith(".json"))

    def folders(self, under: str) -> list[str]:
        """Names of the folders directly in folder `under`, sorted."""
        filesystem_, root = filesystem(self.uri)
        listing = filesystem_.get_file_info(fs.FileSelector(f"{root}/{under}", allow_not_found=True))
        return sorted(info.base_name for info in listing if info.type == fs.FileType.Directory)

    @contextmanager
    def create(
        self, name: str, inputs: str = "", facts: dict[str, Any] | None = None, group: "Group | None" = None
    ) -> Iterator[Path]:
        """A local folder to write output `name` into; it exists, and replaces an earlier one, when the block ends.

        `facts` may be filled within the block. On an exception nothing is left.

        Args:
            group: workers that write the output together, each in a block of its own; rank 0's facts count. What
                another rank writes is named like `x-00002-of-00008.y`, by rank and size. A local state lies on a
                filesystem that all of them have.
        """
        from ctrdist.group import Group  # and with it torch, which a process that only reads need not wait for

        filesystem_, root = filesystem(self.uri)
        group = group or Group()
        folder = f"{name}.{uuid.uuid4().hex[:8]}"
        if self.is_local and group.rank == 0:
            try:
                (Path(root) / folder).mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{self.uri}: cannot write there ({error.strerror}); give another --state") from None
        folder = group.share(folder)[0]
        local = Path(root) / folder if self.is_local else Path(tempfile.mkdtemp(prefix="ctrdist-"))
        before = self.find(name)
        try:
            yield local
            group.share(None)  # until then others may still have temporary files there
            own = checksums(local, lambda path: group.size == 1 or _writer(path) == group.rank)
            if not self.is_local:
                filesystem_.create_dir(f"{root}/{folder}")  # an output may have no files
                fs.copy_files(str(local), f"{root}/{folder}", destination_filesystem=filesystem_)
            files = {path: about for part in group.share(own) for path, about in part.items()}
            if group.rank == 0:
                manifest = Manifest(name, folder, inputs, dict(sorted(files.items())), facts or {})
                self._write_object(f"{name}.json", json.dumps(manifest.__dict__, indent=1).encode())
        except BaseException:
            if group.rank == 0 or not self.is_local:  # rank 0 may have made the output exist already
                shutil.rmtree(local, ignore_errors=True)
            raise
        group.share(None)
        if not self.is_local:
            shutil.rmtree(local, ignore_errors=True)
        if before is not None and group.rank == 0:
            filesystem_.delete_dir(f"{root}/{before.folder}")

    def annotate(self, name: str, facts: dict[str, Any]) -> Manifest:
        """Add facts to the manifest of output `name`, which exists; returns it."""
        before = self.find(name)
        assert before is not None, name
        manifest = replace(before, facts=before.facts | facts)
        self._write_object(f"{name}.json", json.dumps(manifest.__dict__, indent=1).encode())
        return manifest

    def local(self, name: str) -> Path:
        """A local folder with the files of output `name`: its own if the state is local, else a checked copy.

        Raises:
            UserError: there is no such output, or files are missing or cut short.
        """
        manifest = self.find(name)
        if manifest is None:
            raise UserError(f"{self.path(name)}: not there. Give the right --state, or run the job that makes it")
        filesystem_, root = filesystem(self.uri)
        folder = Path(root) / manifest.folder
        if not self.is_local:
            folder = self._copy_of(manifest)
            self.cache.mkdir(parents=True, exist_ok=True)
            with folder.with_suffix(".lock").open("w") as lock:  # processes of this machine that want it at once
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.exists():
                    self.forget_copies()
                    self._copy(f"{root}/{manifest.folder}", folder, manifest)
            os.utime(folder)
        _check(folder, manifest, self)
        return folder

    def read(self, output: Manifest, file: str) -> bytes:
        """The bytes of one file of an output; of a remote one nothing else is fetched.

        Raises:
            UserError: it is not there, or damaged.
        """
        filesystem_, root = filesystem(self.uri)
        where = f"{self.path(output.folder)}/{file}"
        try:
            with filesystem_.open_input_stream(f"{root}/{output.folder}/{file}") as stream:
                content = stream.read()
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error})") from None
        if hashlib.sha256(content).hexdigest() != output.files[file]["sha256"]:
            raise UserError(f"{where}: its checksum does not match")
        return content

    def _copy_of(self, manifest: Manifest) -> Path:
        return self.cache / fingerprint(self.uri, manifest.identity)

    def forget_copies(self, hours: float = 48.0) -> None:
        """Remove local copies of remote outputs that no process of this machine has asked for in so many hours."""
        for path in self.cache.glob("*") if not self.is_local else ():
            with suppress(OSError):  # another process removes it, too
                if time.time() - path.stat().st_mtime > 3600 * hours:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _copy(self, source: str, folder: Path, manifest: Manifest) -> None:
        """Copy remote files to local `folder` at once."""
        filesystem_, _ = filesystem(self.uri)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=self.cache))
        try:
            fs.copy_files(source, str(partial), source_filesystem=filesystem_)
            _check(partial, manifest, self)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove output `name`, manifest first. Nothing happens if it does not exist."""
        manifest = self.find(name)
        if manifest is not None:
            filesystem_, root = filesystem(self.uri)
            filesystem_.delete_file(f"{root}/{name}.json")
            filesystem_.delete_dir(f"{root}/{manifest.folder}")
            if not self.is_local:
                shutil.rmtree(self._copy_of(manifest), ignore_errors=True)

    def scratch(self, file: str) -> str:
        """Path or URI of a file of the state that is no output's: gone, if it was there, and its folder is there."""
        filesystem_, root = filesystem(self.uri)
        if filesystem_.get_file_info(f"{root}/{file}").type == fs.FileType.File:
            filesystem_.delete_file(f"{root}/{file}")
        filesystem_.create_dir(str(Path(root, file).parent), recursive=True)
        return self.path(file)

    def sweep(self, under: str, keep: set[str]) -> None:
        """Remove all that is in folder `under` but the outputs named in `keep`: others, and what never was one."""
        filesystem_, root = filesystem(self.uri)
        for name in self.names(under):
            if name not in keep:
                self.remove(name)
        folders = {self.find(name).folder for name in self.names(under)}
        for name in self.folders(under):
            if f"{under}/{name}" not in folders:
                filesystem_.delete_dir(f"{root}/{under}/{name}")

    def publish(self, name: str, files: tuple[str, ...], folder: str) -> None:
        """Copy files of output `name` into a folder of the state, where people look for them."""
        filesystem_, root = filesystem(self.uri)
        manifest = self.find(name)
        filesystem_.create_dir(f"{root}/{folder}", recursive=True)
        for file in files:
            fs.copy_files(f"{root}/{manifest.folder}/{file}", f"{root}/{folder}/{file}", filesystem_, filesystem_)

    def clear(self, folder: str) -> None:
        """Remove a folder of the state and all that is in it, outputs too. Nothing happens if it does not exist.

        What a process that is about to end writes there meanwhile may stay.
        """
        filesystem_, root = filesystem(self.uri)
        if filesystem_.get_file_info(f"{root}/{folder}").type == fs.FileType.Directory:
            with suppress(OSError):
                filesystem_.delete_dir(f"{root}/{folder}")

    def _write_object(self, name: str, content: bytes) -> None:
        filesystem_, root = filesystem(self.uri)
        target = f"{root}/{name}"
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            partial = f"{target}.{uuid.uuid4().hex[:8]}"
            Path(partial).write_bytes(content)
            os.replace(partial, target)
            return
        with filesystem_.open_output_stream(target) as stream:
            stream.write(content)


def _writer(path: Path) -> int:
    """The rank of the worker that wrote a file which several write together: the one in its name, or the first."""
    numbers = re.search(r"-(\d{5})-of-\d{5}\.", path.name)
    return int(numbers[1]) if numbers else 0


def checksums(folder: Path, counts: Callable[[Path], bool] = lambda path: True) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file in a folder, by its path within; only of those that count, if that is said."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and counts(path)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(folder: Path, manifest: Manifest, state: State) -> None:
    for name, facts in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != facts["bytes"]:
            raise UserError(
                f"{folder / name}: {'missing' if size is None else f'{size} bytes'}, expected {facts['bytes']} bytes; "
                f"remove {state.path(manifest.name)}.json and run the job again to make it anew"
            )
