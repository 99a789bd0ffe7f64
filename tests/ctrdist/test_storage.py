import hashlib
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from ctrdist import storage
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.storage import State, filesystem, fingerprint, masked, write_whole


@pytest.fixture(params=["local", "file://", "remote", "s3"])
def state(request, tmp_path, monkeypatch) -> State:
    """A state in a folder, under a URI, on a filesystem that is not this machine's (Arrow's in memory), and on S3."""
    if request.param == "s3":
        return State(f"{request.getfixturevalue('s3')}/{tmp_path.name}", tmp_path / "cache")
    if request.param == "local":
        return State(tmp_path / "state", tmp_path / "cache")
    if request.param == "file://":
        return State(f"file://{tmp_path}/state", tmp_path / "cache")
    memory, _ = fs.FileSystem.from_uri("mock://")
    memory.create_dir("state")
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (memory, uri[7:]) if str(uri).startswith("mock://") else filesystem(uri)
    )
    return State("mock://state", tmp_path / "cache")


def objects(state: State) -> set[str]:
    """Every file of a state, by its path within."""
    filesystem_, root = storage.filesystem(state.uri)
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    infos = filesystem_.get_file_info(selector)
    return {info.path.removeprefix(f"{root}/") for info in infos if info.type == fs.FileType.File}


def write(state: State, name: str, content: str, inputs: str = "", facts: dict | None = None):
    with state.create(name, inputs, facts) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "b.txt").write_text(content * 2)
    return state.find(name)


def test_what_is_written_can_be_found_and_read(state):
    assert state.find("runs/x") is None
    manifest = write(state, "runs/x", "hello", "f00", {"rows": 3})
    assert manifest.name == "runs/x" and manifest.inputs == "f00" and manifest.facts == {"rows": 3}
    assert manifest.files == {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in (("a.txt", "hello"), ("deep/er/b.txt", "hellohello"))
    }
    folder = state.local("runs/x")
    assert (folder / "a.txt").read_text() == "hello"
    assert (folder / "deep/er/b.txt").read_text() == "hellohello"
    assert objects(state) == {"runs/x.json", f"{manifest.folder}/a.txt", f"{manifest.folder}/deep/er/b.txt"}
    again = pickle.loads(pickle.dumps(state))
    assert again.find("runs/x") == manifest and again.local("runs/x") == folder


def test_other_inputs_are_not_found(state):
    write(state, "x", "a", "one")
    assert state.find("x", "one") == state.find("x")
    assert state.find("x", "two") is None
    assert state.find("x", "") is None


def test_facts_may_be_filled_within_the_block(state):
    facts = {}
    with state.create("x", facts=facts):
        facts["late"] = [1, 2]
    assert state.find("x").facts == {"late": [1, 2]}
    assert list(state.local("x").iterdir()) == []


def test_a_new_output_replaces_the_old_one_and_its_files(state):
    old = write(state, "x", "old")
    assert (state.local("x") / "a.txt").read_text() == "old"
    new = write(state, "x", "new")
    assert new.folder != old.folder and new.identity != old.identity
    assert (state.local("x") / "a.txt").read_text() == "new"
    assert objects(state) == {"x.json", f"{new.folder}/a.txt", f"{new.folder}/deep/er/b.txt"}
    same = write(state, "x", "new")
    assert same.identity == new.identity and same.folder != new.folder


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_keeps_the_earlier_output(state, stop):
    def fail(name):
        with state.create(name) as folder:
            (folder / "half.txt").write_text("half")
            raise stop("no more")

    with pytest.raises(stop):
        fail("x")
    assert state.find("x") is None and objects(state) == set()
    write(state, "x", "good")
    before = objects(state)
    with pytest.raises(stop):
        fail("x")
    assert objects(state) == before
    assert (state.local("x") / "a.txt").read_text() == "good"


def test_a_folder_without_a_manifest_is_not_there(state):
    write(state, "runs/x", "a")
    filesystem_, root = storage.filesystem(state.uri)
    filesystem_.create_dir(f"{root}/runs/half.12345678")
    with filesystem_.open_output_stream(f"{root}/runs/half.12345678/model") as stream:
        stream.write(b"12")
    assert state.names("runs") == ["runs/x"]
    assert state.find("runs/half") is None
    with pytest.raises(UserError, match="runs/half: not there.*--state"):
        state.local("runs/half")


def test_names_are_of_one_folder_sorted(state):
    for name in ("runs/b", "runs/a", "runs/sub/c", "other/d"):
        write(state, name, "x")
    assert state.names("runs") == ["runs/a", "runs/b"]
    assert state.names("runs/sub") == ["runs/sub/c"]
    assert state.names("nothing") == []


def test_remove(state):
    write(state, "x", "a")
    write(state, "y", "b")
    state.remove("x")
    state.remove("x")
    assert state.find("x") is None
    assert objects(state) == {"y.json", f"{state.find('y').folder}/a.txt", f"{state.find('y').folder}/deep/er/b.txt"}


def test_a_scratch_file_is_gone_when_it_is_asked_for_again(state):
    uri = state.scratch("runs/a/notes.jsonl")
    filesystem_, path = storage.filesystem(uri)
    with filesystem_.open_output_stream(path) as stream:
        stream.write(b"{}")
    assert "runs/a/notes.jsonl" in objects(state) and not state.names("runs/a")
    assert state.scratch("runs/a/notes.jsonl") == uri and "runs/a/notes.jsonl" not in objects(state)


def test_published_files_lie_where_people_look_and_a_cleared_folder_is_gone(state):
    manifest = write(state, "s/result", "hello")
    write(state, "s/stages/one", "x")
    write(state, "s/stages.other", "y")
    state.publish("s/result", ("a.txt",), "s")
    assert {"s/a.txt", f"{manifest.folder}/a.txt"} <= objects(state)
    state.clear("s/stages")
    state.clear("s/never")
    assert not state.names("s/stages") and not any(path.startswith("s/stages/") for path in objects(state))
    assert state.find("s/stages.other") and state.find("s/result") == manifest and "s/a.txt" in objects(state)


def test_annotate_adds_facts_and_keeps_the_rest(state):
    before = write(state, "x", "a", "in", {"rows": 1, "auc": None})
    after = state.annotate("x", {"auc": 0.5, "status": "kept"})
    assert after == state.find("x", "in")
    assert after.facts == {"rows": 1, "auc": 0.5, "status": "kept"}
    assert (after.files, after.folder, after.identity) == (before.files, before.folder, before.identity)
    assert (state.local("x") / "a.txt").read_text() == "a"


@pytest.mark.parametrize("damage", ["short", "gone"])
def test_damaged_files_are_named(state, damage):
    manifest = write(state, "x", "hello")
    filesystem_, root = storage.filesystem(state.uri)
    path = f"{root}/{manifest.folder}/a.txt"
    if damage == "gone":
        filesystem_.delete_file(path)
    else:
        with filesystem_.open_output_stream(path) as stream:
            stream.write(b"hel")
    with pytest.raises(UserError, match=r"a\.txt: (3 bytes|missing), expected 5 bytes; remove .*x\.json"):
        state.local("x")
    assert not [path for path in state.cache.glob("*") if path.suffix != ".lock"]


def test_a_manifest_is_plain_json_with_its_name(state):
    write(state, "x", "a")
    filesystem_, root = storage.filesystem(state.uri)
    with filesystem_.open_input_stream(f"{root}/x.json") as stream:
        assert set(json.loads(stream.read())) == {"name", "folder", "inputs", "files", "facts"}
    assert state.path("x") == f"{state.uri}/x"


def test_a_remote_output_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr(State, "is_local", property(lambda _: False))
    state = State(f"file://{tmp_path}/state", tmp_path / "cache")
    (tmp_path / "state").mkdir()
    manifest = write(state, "x", "a")
    folder = state.local("x")
    assert folder.is_relative_to(tmp_path / "cache")
    (tmp_path / "state" / manifest.folder / "a.txt").unlink()
    assert (state.local("x") / "a.txt").read_text() == "a"
    write(state, "x", "b")
    assert (state.local("x") / "a.txt").read_text() == "b"


def test_a_machine_copies_a_remote_output_once_however_many_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(State, "is_local", property(lambda _: False))
    (tmp_path / "state").mkdir()
    state = State(f"file://{tmp_path}/state", tmp_path / "cache")
    write(state, "x", "a")
    copy_files, copies, found = fs.copy_files, [], []

    def slow(*args, **kwargs):
        copies.append(args)
        time.sleep(0.2)
        copy_files(*args, **kwargs)

    monkeypatch.setattr(fs, "copy_files", slow)
    asking = [threading.Thread(target=lambda: found.append(state.local("x"))) for _ in range(4)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert len(copies) == 1 and len(found) == 4 and (found[0] / "a.txt").read_text() == "a" and len(set(found)) == 1


def test_copies_that_nobody_asks_for_go_and_so_do_those_of_what_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(State, "is_local", property(lambda _: False))
    (tmp_path / "state").mkdir()
    state = State(f"file://{tmp_path}/state", tmp_path / "cache")
    folders = {name: state.local(write(state, name, name).name) for name in "xyz"}
    for name in "xy":
        os.utime(folders[name], (0, 0))
    assert state.local("y") == folders["y"], "asked for just now"
    state.local(write(state, "new", "new").name)
    assert [name for name in "xyz" if folders[name].exists()] == ["y", "z"]
    state.remove("z")
    assert folders["y"].exists() and not folders["z"].exists()
    assert (state.local("x") / "a.txt").read_text() == "x", "it is copied again"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there.*--state"):
        with State(tmp_path / "file").create("x"):
            raise AssertionError("not reached")


def test_fingerprint_depends_on_content_only():
    assert fingerprint({"b": 1, "a": (1, 2)}, "x") == fingerprint({"a": [1, 2], "b": 1}, "x")
    assert fingerprint(Path("/a")) == fingerprint("/a")
    different = [fingerprint(*parts) for parts in [("a", "b"), ("ab",), ("b", "a"), (["a", "b"],), (1,), ("1",)]]
    assert len(set(different)) == len(different) and all(len(digits) == 16 for digits in different)


class Two(Group):
    """One of two workers in threads of this process, for outputs that they write together."""

    def __init__(self, rank: int, shelf: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.shelf, self.barrier = rank, 2, shelf, barrier

    def share(self, value):
        self.shelf[self.rank] = value
        self.barrier.wait(10)
        out = list(self.shelf)
        self.barrier.wait(10)
        return out


def together(state: State, body) -> list:
    """Both workers' `body(rank, folder)` in one output, and what each raised."""
    barrier, shelf, raised = threading.Barrier(2), [None, None], [None, None]

    def work(rank: int) -> None:
        try:
            with state.create("both", "in", {"rank": rank}, Two(rank, shelf, barrier)) as folder:
                body(rank, folder)
        except Exception as error:
            raised[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def write_parts(rank: int, folder: Path) -> None:
    (folder / f"x-{rank:05d}-of-00002.bin").write_bytes(b"ab" * (rank + 1))
    if rank == 0:
        (folder / "rest.json").write_text("{}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p/w@s@h/db", "postgresql://***@h/db"),
        ("https://token@host", "https://***@host"),
        ("postgresql:///db?user=u&password=p&ssl=1", "postgresql:///db?user=u&password=***&ssl=1"),
        ("404 for url: http://u:p@h/a b", "404 for url: http://***@h/a b"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("s3://bucket/log", "s3://bucket/log"),
    ],
)
def test_addresses_are_shown_without_secrets(text: str, shown: str):
    assert masked(text) == shown


def test_two_workers_write_one_output(state):
    for _ in range(2):
        assert together(state, write_parts) == [None, None]
        manifest = state.find("both", "in")
        assert manifest.facts == {"rank": 0}
        assert list(manifest.files) == ["rest.json", "x-00000-of-00002.bin", "x-00001-of-00002.bin"]
        assert manifest.files["x-00001-of-00002.bin"]["bytes"] == 4
        folder = state.local("both")
        assert {path.name for path in folder.iterdir()} == set(manifest.files)
        assert (folder / "x-00001-of-00002.bin").read_bytes() == b"abab"
        assert len(objects(state)) == 4, "the earlier one is gone"


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_of_two_fails_the_earlier_output_stays(state, failing: int):
    together(state, write_parts)
    before = state.find("both")

    def fail(rank: int, folder: Path) -> None:
        write_parts(rank, folder)
        if rank == failing:
            raise KeyError("the disk is full")

    raised = together(state, fail)
    assert isinstance(raised[failing], KeyError)
    # The other waits in vain, or finds the folder gone.
    assert isinstance(raised[1 - failing], threading.BrokenBarrierError | FileNotFoundError)
    assert state.find("both") == before and state.local("both").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / ".x.parquet.died").mkdir()
    (tmp_path / ".x.parquet.died" / "x.parquet").write_text("half")
    with pytest.raises(ZeroDivisionError):
        with write_whole(f"{tmp_path}/x.parquet") as partial:
            partial.write_text("half")
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir()), "and what a process that died has left goes"
    with write_whole(f"{tmp_path}/inner/x.parquet") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "inner" / "x.parquet").exists()
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["x.parquet"]
    assert (tmp_path / "inner" / "x.parquet").read_text() == "whole"
