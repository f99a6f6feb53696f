"""Files that are replaced whole or not at all, and places that one process has at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# process, device and inode: a forked child inherits the set, and not the locks
_held: set[tuple[int, int, int]] = set()


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace the file: whoever reads it, after any accident, finds the old or the new one.

    Several processes may write the same file: one whole content is there at any time, the last in
    the end. A process that is killed may leave a file NAME.TOKEN.partial, which nobody reads and
    :func:`lock` removes. Devices, pipes and all that is under /dev and /proc, other than /dev/shm,
    are written to as they stand: what is written to /dev/stdout follows what was printed.
    """
    stream = _stream(path)
    if stream is not None:
        for printed in (sys.stdout, sys.stderr):
            if printed is not None and not printed.closed:
                printed.flush()
        with open(stream, "ab", closefd=not isinstance(stream, int)) as file:
            file.write(content)
        return
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces the one at ``path`` when all is written.

    Raises:
        OSError: ``path`` is a device or a pipe, which cannot be replaced.
    """
    if _stream(path) is not None:
        raise OSError(f"{path} is a device or a pipe: name a file")
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:  # the file is replaced; some file systems sync no folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(folder)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Have a folder, or a file that is about to be written, to oneself: for writers alone.

    The lock is a file beside it, ``.lock`` or ``.NAME.lock``, that says who has it. The system lets
    it go when the process ends, however that ends. A forked child does not have it, and does not
    let it go. All links to a file share its lock. Reading needs no lock. What killed processes
    left half written there is removed. Windows, and file systems that have no locks, give a
    warning instead of a lock.

    Raises:
        RuntimeError: Another process has it; names that. Or this process has it already.
        OSError: The folder cannot be written to, or the lock's name belongs to a link, a folder or
            another thing that is no file.
    """
    if _stream(path) is not None:
        yield
        return
    whole = path.is_dir()
    real = Path(os.path.realpath(path))  # where `write` writes
    place = real / ".lock" if whole else real.with_name(f".{real.name}.lock")
    process = os.getpid()
    held = _acquired(path, place)
    try:
        if held is not None:
            name = ".+" if whole else re.escape(real.name)
            for left in place.parent.iterdir():
                if re.fullmatch(rf"{name}\.[0-9a-f]{{16}}\.partial", left.name):
                    left.unlink(missing_ok=True)
        yield
    finally:
        if held is not None and os.getpid() == process:
            # while it is held: whoever waits for this file finds that it is gone, and makes another
            place.unlink(missing_ok=True)
            _held.discard(_identity(held))
            fcntl.flock(held, fcntl.LOCK_UN)  # a forked process may have it too
        if held is not None:
            os.close(held)


def _stream(path: Path) -> Path | int | None:
    """What is written to as it stands: a device, a pipe, or a descriptor of this process; or None.

    A descriptor may be that of an ordinary file. Opening it by name again would empty that file, or
    lead to writing over what is printed, so links are followed one by one until it shows.
    """
    if path.is_dir():
        return None
    found = path.exists() and not path.is_file()
    name, seen = os.path.join(os.getcwd(), path), set()
    while name not in seen:
        seen.add(name)
        folder, last = os.path.realpath(os.path.dirname(name)), os.path.basename(name)
        if folder == os.path.realpath("/proc/self/fd") and last.isdecimal():
            return int(last)
        name = os.path.join(folder, last)
        found = found or re.match(r"/(dev/(?!shm/)|proc/)", name) is not None
        if os.path.islink(name):
            name = os.path.join(folder, os.readlink(name))
    return path if found else None


def _acquired(path: Path, place: Path) -> int | None:
    """The open and locked file; None, with a warning, where there are no locks."""
    while True:
        file = _opened(path, place)
        try:
            if fcntl is None:
                raise OSError("Windows has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner, mine = _owner(file), _identity(file) in _held
            os.close(file)
            advice = "wait until that ends, or name another place"
            if mine:
                advice = (
                    "that is this process, so name another place if two arguments name this one"
                )
            raise RuntimeError(f"{path} is in use by {owner}: {advice}") from None
        except OSError as error:
            os.close(file)
            place.unlink(missing_ok=True)
            warnings.warn(
                f"{path} cannot be locked ({error}): start no other run that writes there",
                stacklevel=4,
            )
            return None
        if _is_named(file, place):
            break
        os.close(file)  # another process had it, and has removed it since
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    said = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(said).encode())
    _held.add(_identity(file))
    return file


def _opened(path: Path, place: Path) -> int:
    """The lock's file, made if need be; never what a link of its name leads to."""
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISREG(mode):
        # without a link's target, and without waiting at a pipe, that came between the two calls
        wary = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.open(place, os.O_RDWR | os.O_CREAT | wary, 0o666)
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
    raise OSError(
        f"{path} cannot be locked: {place} is not a regular file; remove it, or name another place"
    )


def _identity(file: int) -> tuple[int, int, int]:
    found = os.fstat(file)
    return os.getpid(), found.st_dev, found.st_ino


def _is_named(file: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(place))
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    """Who has the lock, as it says in the file."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "another process"  # it was locked a moment ago, or by another program
