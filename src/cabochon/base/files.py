"""Files and folders that are written whole or not at all, and their hashes.

Everything is first written beside its target under a hidden name, forced to the disk, and then renamed, which
the file system does in one step. A reader sees the old state or the new one. A process that is killed leaves at
most the hidden name; the next write of the same folder removes it, or goes on with it (`resumable_folder`).
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cabochon.base.errors import BadInput, UsageError

_KEY = "key"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well and vanishes when it does not.

    Raises `OSError` as the file system gives it (no space, no permission, ...).
    """
    path = path.resolve()  # a link stays a link: what it points to is replaced
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_file_mode(path))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new, empty folder that takes the place of `path` when the block ends well and vanishes when it does not.

    Parents are made as needed. Raises `UsageError` when `path` is a file, a mount point, or a folder with
    something in it (unless `overwrite`), and `OSError` as the file system gives it.
    """
    path = path.resolve()
    _check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_sibling(path) as temporary:
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.chmod(0o777 & ~_umask())
            _check_target(path, overwrite)  # something may have been put there meanwhile
            _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _sync(path.parent)


@dataclass(frozen=True)
class Unfinished:
    """Work that can be taken up again: what is in `folder` becomes the folder that is written, `notes` never do."""

    folder: Path
    notes: Path


@contextlib.contextmanager
def resumable_folder(path: Path, key: str, *, overwrite: bool = False) -> Iterator[Unfinished]:
    """As `atomic_folder`, for work that takes long: when the block fails or the process dies, what is there is kept,
    unless the input was bad.

    The next call with the same `key` gets the same folder and notes with everything in them; it is up to the caller to
    know what of it is whole. A call with another key begins anew. Raises `UsageError` also while another process is at
    work there.
    """
    path = path.resolve()
    kept = _unfinished(path)
    work = Unfinished(kept / "folder", kept)
    if kept.is_dir() and not work.folder.is_dir():  # the process died after the last step but one
        with _lock(kept, wait=False) as ours:
            if ours:
                shutil.rmtree(kept, ignore_errors=True)
    _check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.mkdir(mode=0o700, exist_ok=True)
    with _lock(kept, wait=False) as ours:
        if not ours:
            raise UsageError(
                f"{path} was not written", "another process is writing it", "wait for it, or name another folder"
            )
        mark = kept / _KEY
        if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
            for old in kept.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            mark.write_text(key, encoding="utf-8")
        work.folder.mkdir(exist_ok=True)
        try:
            yield work
        except BadInput:  # would fail again
            shutil.rmtree(kept, ignore_errors=True)
            raise
        _check_target(path, overwrite)
        for file in work.folder.rglob("*"):
            _sync(file)
        _swap(work.folder, path)
        _sync(path.parent)
        shutil.rmtree(kept, ignore_errors=True)
        remove_left_behind(path.parent, _literal(path.name))


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made when it is not there, until the block ends or the process does.

    Raises `UsageError` while another process holds it, and `OSError` as the file system gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, wait=False) as ours:
        if not ours and sys.platform != "win32":
            raise UsageError(
                f"{folder} was not written to",
                "another process is at work in it",
                "wait for it, or name another folder",
            )
        yield


def unfinished_bytes(path: Path) -> int:
    """Bytes on the disk of what `resumable_folder` keeps for `path`."""
    return sum(file.stat().st_blocks * 512 for file in (_unfinished(path.resolve()) / "folder").glob("*"))


def _unfinished(path: Path) -> Path:
    return path.parent / f".{path.name}.unfinished"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} was not written", "it is a file, not a folder", "name a new folder")
    if path.is_mount():  # cannot be renamed over
        raise UsageError(f"{path} was not written", "a disk is mounted there", f"name a folder in it: {path / 'model'}")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(
            f"{path} was not written",
            "the folder is not empty",
            "name a new folder, or ask for it to be replaced (--overwrite, overwrite=True)",
        )


def _swap(new: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        new.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked_sibling(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, locked while this process lives; those of dead processes are removed."""
    remove_left_behind(path.parent, _literal(path.name))
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with _lock(temporary, wait=True) as ours:
            if ours:  # not if another process took it for left behind before it was locked
                yield temporary
                return


def remove_left_behind(parent: Path, name: str = "*") -> None:
    """Remove what processes that died while writing folders left in `parent`: of all folders, or of one name."""
    for left_behind in parent.glob(f".{name}.*.partial"):
        with _lock(left_behind, wait=False) as ours:
            if ours:
                shutil.rmtree(left_behind, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process however it ends. False: gone, or held by another."""
    if sys.platform == "win32":  # no locks on folders: nothing is ever taken for left behind
        yield wait
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder.exists()
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _file_mode(path: Path) -> int:
    """The mode of the file that is replaced, or what `open` would give a new one."""
    return path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
