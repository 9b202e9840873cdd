"""Write files and directories whole or not at all, and lock directories that have one writer.

Whoever reads a file or a directory written here finds the old one or the new one, even after a kill.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from sapo.errors import ConfigError


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name, flush it to the disk and rename it."""
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    aside.rename(file)


@contextmanager
def new_directory(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give an empty directory to fill and rename it to `path` at the end; an exception leaves nothing behind.

    Args:
        path: must not exist, or be an empty directory.
        shared: two processes may make the same directory, as two runs make one cold start: the directory of the first
            one stays, that of the other is deleted.
    """
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            aside.rename(path)
        except OSError as error:
            if not shared or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_directory(aside: Path, path: Path, replaced: Path) -> None:
    """Flush a filled directory to the disk and rename it to `path`, in the place of one that is there.

    Args:
        aside: the filled directory, on the same file system.
        replaced: name of the old directory between the two renames; a kill between them loses the old one only.
    """
    for file in (*aside.rglob("*"), aside):
        _flush(file)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    aside.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def lock_directory(path: Path) -> IO[str]:
    """Lock an existing directory until the returned file is closed.

    The kernel holds the lock: a killed process gives it back. A process that inherits the file shares the lock, and
    keeps it for as long as it lives. `filelock.FileLock` hides its descriptor, so ours is locked instead.

    Raises:
        ConfigError: another process has locked it.
        OSError: it cannot be written.
    """
    lock = (path / ".lock").open("w")
    try:
        if lock_descriptor(lock.fileno(), blocking=False):
            return lock
    except BaseException:
        lock.close()
        raise
    lock.close()
    raise ConfigError(f"another process is writing {path}; wait for it or stop it")


def _flush(path: Path) -> None:
    """Flush to the disk, so that a rename never gets there before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
