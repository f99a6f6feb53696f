"""Files that are replaced whole, and places that one process has at a time."""

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fastgt import files

fcntl = pytest.importorskip("fcntl")

WRITER = """
import sys; from pathlib import Path; from fastgt import files
path, letter, size = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
while True:
    files.write(path, letter * size)
"""
HOLDER = """
import sys, time; from pathlib import Path; from fastgt import files
with files.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
FORKER = """
import os, sys, time; from pathlib import Path; from fastgt import files
with files.lock(Path(sys.argv[1])):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("locked", flush=True)
        time.sleep(60)
"""
PRINTER = """
import sys; from pathlib import Path; from fastgt import files
path = Path(sys.argv[1])
with files.lock(path):
    for line in ("first", "last"):
        print(line)
        files.write(path, b"rows\\n")
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(run: subprocess.Popen) -> str:
    run.send_signal(signal.SIGKILL)
    return run.communicate(timeout=60)[1]


def partials(folder: Path) -> list[str]:
    return [x.name for x in folder.iterdir() if x.name.endswith(".partial")]


def test_two_writers_of_a_file_leave_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    whole = {b"A": 4_000_000, b"B": 3_000_000}
    runs = [start(WRITER, path, x.decode(), size) for x, size in whole.items()]
    seen = set()
    limit = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < limit:
        if not path.exists():
            continue
        content = path.read_bytes()
        letter = content[:1]
        assert content == letter * whole[letter], "torn"
        seen.add(letter)
    for run in runs:
        assert run.poll() is None, run.communicate()[1]
        assert kill(run) == ""
    assert len(seen) == 2
    content = path.read_bytes()
    assert content == content[:1] * whole[content[:1]]
    with files.lock(tmp_path):  # what the killed ones left
        assert partials(tmp_path) == []
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    files.write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["rows.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("refused", ["folder", "file"])
def test_only_a_file_system_that_syncs_no_folders_is_let_off(
    refused: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode) == (refused == "folder"):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "rows.json"
    path.write_text("old")
    opened = len(os.listdir("/dev/fd"))
    if refused == "folder" and number != errno.EIO:
        files.write(path, b"new")
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            files.write(path, b"new")
    assert path.read_text() == ("new" if refused == "folder" else "old")
    assert os.listdir(tmp_path) == ["rows.json"]
    assert len(os.listdir("/dev/fd")) == opened


def test_no_two_writes_have_one_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = [], os.replace

    def spy(old: Path, new: Path) -> None:
        names.append(old.name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", spy)
    for _ in range(3):
        files.write(tmp_path / "a.csv", b"1")
    assert len(set(names)) == 3
    assert all(name.startswith("a.csv.") for name in names)


def test_written_files_have_the_usual_permissions_and_links_stay(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        files.write(tmp_path / "file", b"1")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"2"


def test_devices_and_pipes_are_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with files.lock(pipe):
        files.write(pipe, b"rows")
    assert os.read(reader, 10) == b"rows"
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]
    code = "from pathlib import Path; from fastgt import files\n"
    run = start(code + "files.write(Path('/dev/stdout'), b'rows')")
    assert run.communicate(timeout=60) == ("rows", "")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "mode"),
    [("/dev/stdout", "wb"), ("/dev/fd/1", "ab"), ("chain", "wb"), ("fd/../../self/fd/1", "wb")],
)
def test_output_that_goes_to_a_file_keeps_what_is_printed(
    name: str, mode: str, tmp_path: Path
) -> None:
    output, links = tmp_path / "output", tmp_path / "links"
    output.mkdir()
    links.mkdir()
    (links / "fd").symlink_to("/dev/fd")
    (links / "dev").symlink_to("/dev")
    (links / "chain").symlink_to("dev/stdout")
    printed = output / "printed.txt"
    with printed.open(mode) as file:
        before = os.fstat(file.fileno()).st_ino
        subprocess.run(
            [sys.executable, "-c", PRINTER, links / name], stdout=file, check=True, timeout=60
        )
    assert printed.read_text() == "first\nrows\nlast\nrows\n"
    assert printed.stat().st_ino == before
    assert os.listdir(output) == ["printed.txt"]
    assert sorted(os.listdir(links)) == ["chain", "dev", "fd"]


def test_nothing_is_made_beside_a_device() -> None:
    with files.lock(Path("/dev/null")), files.lock(Path("/dev/null")):
        files.write(Path("/dev/null"), b"rows")
        assert not Path("/dev/.null.lock").exists()
    with pytest.raises(OSError, match="/dev/no/such"):
        files.write(Path("/dev/no/such"), b"rows")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_files_in_shared_memory_are_replaced_like_others() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "rows.json"
        path.write_text("older rows")
        before = path.stat().st_ino
        with files.lock(path):
            assert sorted(os.listdir(folder)) == [".rows.json.lock", "rows.json"]
            files.write(path, b"rows")
        assert path.read_text() == "rows"
        assert path.stat().st_ino != before


def test_a_link_to_itself_is_no_device(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.symlink_to(path)
    with files.lock(path):
        files.write(path, b"rows")
    assert path.read_bytes() == b"rows"


@pytest.mark.parametrize("kind", ["folder", "file", "file to come"])
def test_a_lock_keeps_a_second_writer_out_and_names_the_first(kind: str, tmp_path: Path) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "rows.json"
    if kind == "file":
        path.write_text("[]")
    run = start(HOLDER, path)
    assert run.stdout is not None
    assert run.stdout.readline() == "locked\n"
    said = rf"in use by process {run.pid} on {socket.gethostname()} since 20\d\d-\d\d-\d\d \d\d:"
    with pytest.raises(RuntimeError, match=said), files.lock(path):
        pytest.fail("both have it")
    if kind == "file":
        assert path.read_text() == "[]"  # readers are let in
    kill(run)
    left = os.listdir(tmp_path)
    assert any(name.endswith(".lock") for name in left)
    with files.lock(path):  # of a process that is gone
        said = f"in use by process {os.getpid()}"
        with pytest.raises(RuntimeError, match=said), files.lock(path):
            pytest.fail("both have it")
    assert os.listdir(tmp_path) == (["rows.json"] if kind == "file" else [])


def test_a_lock_is_let_go_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    with files.lock(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with files.lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_forked_child_that_leaves_does_not_give_the_lock_away(tmp_path: Path) -> None:
    run = start(FORKER, tmp_path)
    assert run.stdout is not None
    try:
        assert run.stdout.readline() == "locked\n"
        assert os.listdir(tmp_path) == [".lock"]
        said = f"in use by process {run.pid} on .*: wait until"
        with pytest.raises(RuntimeError, match=said), files.lock(tmp_path):
            pytest.fail("both have it")
    finally:
        kill(run)


def test_a_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.lock(tmp_path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_locking_a_folder_and_its_files_are_different_things(tmp_path: Path) -> None:
    with files.lock(tmp_path), files.lock(tmp_path / "a.json"), files.lock(tmp_path / "b.json"):
        assert len(os.listdir(tmp_path)) == 3


def test_a_lock_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # opened before its owner removed it, locked after: whoever comes next locks another file
    real, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="in use"), files.lock(tmp_path):
            pass
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_where_there_are_no_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match="cannot be locked .*not implemented"),
        files.lock(tmp_path),
    ):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked .Windows"), files.lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_only_leftovers_of_ones_own_files_are_removed(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    for name in (f"a.json.{token}.partial", f"b.json.{token}.partial", "film.mkv.partial"):
        (tmp_path / name).write_text("half")
    with files.lock(tmp_path / "a.json"):
        assert sorted(partials(tmp_path)) == [f"b.json.{token}.partial", "film.mkv.partial"]
    with files.lock(tmp_path):
        assert partials(tmp_path) == ["film.mkv.partial"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError), files.lock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("thing", ["link", "dangling link", "folder", "pipe"])
def test_a_lock_leaves_alone_what_is_no_file_of_its_own(
    thing: str, kind: str, tmp_path: Path
) -> None:
    precious, output = tmp_path / "precious", tmp_path / "output"
    precious.write_text("of years")
    output.mkdir()
    path = output if kind == "folder" else output / "rows.json"
    place = output / (".lock" if kind == "folder" else ".rows.json.lock")
    if thing == "link":
        place.symlink_to(precious)
    elif thing == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif thing == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)
    said = re.escape(f"{path} cannot be locked: {place} is not a regular file; remove it")
    with pytest.raises(OSError, match=said), files.lock(path):
        pytest.fail("locked")
    assert precious.read_text() == "of years"
    assert os.listdir(output) == [place.name]
    assert sorted(os.listdir(tmp_path)) == ["output", "precious"]


def test_a_link_that_comes_while_a_lock_is_made_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious, output = tmp_path / "precious", tmp_path / "output"
    precious.write_text("of years")
    output.mkdir()
    real = os.open

    def late(place: Path, *rest: int) -> int:
        Path(place).symlink_to(precious)
        return real(place, *rest)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OSError, match=re.escape(str(output / ".lock"))), files.lock(output):
        pytest.fail("locked")
    assert precious.read_text() == "of years"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b'"x"', b"{}", b'{"pid": 1}', b"[" * 4096, b"\xff"]
)
def test_a_lock_that_says_something_else_is_of_another_process(
    content: bytes, tmp_path: Path
) -> None:
    with (tmp_path / ".lock").open("wb") as other:
        other.write(content)
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        said = "in use by another process: wait until"
        with pytest.raises(RuntimeError, match=said), files.lock(tmp_path):
            pytest.fail("both have it")
    assert (tmp_path / ".lock").read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "file", "file to come"])
def test_all_links_to_a_place_share_its_lock_and_its_leftovers(kind: str, tmp_path: Path) -> None:
    real, other = tmp_path / "real", tmp_path / "other"
    real.mkdir()
    other.mkdir()
    place = real if kind == "folder" else real / "rows.json"
    if kind == "file":
        place.write_text("[]")
    link = other / "link"
    link.symlink_to(place)
    left = real / "rows.json.0123456789abcdef.partial"
    left.write_text("half")
    with files.lock(link):
        assert not left.exists()
        said = f"^{re.escape(str(place))} is in use by process {os.getpid()}"
        with pytest.raises(RuntimeError, match=said), files.lock(place):
            pytest.fail("both have it")
    with files.lock(place):
        said = f"^{re.escape(str(link))} is in use by process {os.getpid()}"
        with pytest.raises(RuntimeError, match=said), files.lock(link):
            pytest.fail("both have it")
    assert os.listdir(other) == ["link"]
    assert os.listdir(real) == (["rows.json"] if kind == "file" else [])


def test_a_process_that_has_a_lock_already_is_not_told_to_wait_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for _ in range(2):
        with files.lock(path):
            with pytest.raises(RuntimeError) as error, files.lock(path):
                pytest.fail("twice")
            assert f"in use by process {os.getpid()} on " in str(error.value)
            assert "that is this process" in str(error.value)
            assert "wait" not in str(error.value)
    run = start(HOLDER, path)
    assert run.stdout is not None
    try:
        assert run.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="wait until"), files.lock(path):
            pytest.fail("both have it")
    finally:
        kill(run)
