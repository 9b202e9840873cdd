"""Write files and directories whole or not at all, and lock directories that have one writer.

Whoever reads a file or a directory written here finds the old one or the new one, even after a kill.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from sapo.errors import ConfigError, StorageError


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file under another name, flush it to the disk and rename it. Text is written as UTF-8."""
    aside = aside_of(file)
    try:
        with aside.open("wb") as opened:
            opened.write(content.encode("utf-8") if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
        aside.rename(file)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def aside_of(file: Path) -> Path:
    """Return the name under which `write_whole` writes a file; one is left behind by a kill."""
    return file.with_name(f".{file.name}.writing")


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


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, or a file; nothing where there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_directory(aside: Path, path: Path, replaced: Path) -> None:
    """Flush a filled directory to the disk and rename it to `path`, in the place of one that is there.

    Args:
        aside: the filled directory, on the same file system.
        replaced: name of the old directory between the two renames; a kill between them loses the old one only.
    """
    for file in (*aside.rglob("*"), aside):
        _flush(file)
    if path.exists():
        remove(replaced)
        path.rename(replaced)
    aside.rename(path)
    _flush(path.parent)
    remove(replaced)


class DirectoryLock:
    """A lock on a directory, held until it is closed; made by `lock_directory`."""

    def __init__(self, file: IO[str], directory: int | None) -> None:
        self._file = file
        self._directory = directory

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Return the open files that hold it: a process that inherits these shares the lock."""
        return (self._file.fileno(), *(() if self._directory is None else (self._directory,)))

    def fileno(self) -> int:
        """Return the open file that holds it."""
        return self._file.fileno()

    def close(self) -> None:
        """Give the lock back; a second time does nothing."""
        self._file.close()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None


def lock_directory(path: Path) -> DirectoryLock:
    """Lock an existing directory until the returned lock is closed.

    The kernel holds the lock: a killed process gives it back. A process that inherits the open files shares it, and
    keeps it for as long as it lives. The file `.lock` is locked, and the directory itself as well, where the file
    system can: who deletes the file frees nothing. `filelock.FileLock` hides its descriptor, so ours is locked instead.

    Raises:
        ConfigError: another process has locked it.
        OSError: it cannot be written.
    """
    file, directory = (path / ".lock").open("w"), None
    try:
        held = lock_descriptor(file.fileno(), blocking=False)
        if held:
            directory = os.open(path, os.O_RDONLY)
            try:
                held = lock_descriptor(directory, blocking=False)
            except OSError:  # a network's file system may lock files only
                os.close(directory)
                directory = None
        if held:
            return DirectoryLock(file, directory)
    except BaseException:
        file.close()
        raise
    file.close()
    if directory is not None:
        os.close(directory)
    raise ConfigError(f"another process is writing {path}; wait for it or stop it")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors that are a disk's fault and not a name's."""


def unwritable(path: Path, option: str, error: OSError) -> ConfigError | StorageError:
    """Return the refusal of a name that cannot be written to, or the failure of its disk.

    >>> unwritable(Path("a"), "--out", OSError(errno.ENOSPC, "No space left on device"))
    StorageError('a cannot be written: No space left on device; make room, and run the same command again')
    """
    if error.errno in FULL:
        return StorageError(f"{path} cannot be written: {error.strerror}; make room, and run the same command again")
    return ConfigError(f"{path} cannot be written: {error.strerror}; choose another {option}")


def check_output(path: Path, option: str, *, directory: bool = False) -> None:
    """Refuse a path that nothing can be written to, before the work is done that is to be written there.

    Args:
        option: the option that named it, for the message.
        directory: it is to be a directory, and a file otherwise; neither is made here.

    Raises:
        ConfigError: it is of the other kind, a link that leads nowhere, or lies where nothing can be made.
    """
    wanted = "a directory" if directory else "a file"
    try:
        if os.path.lexists(path) and not path.exists():
            raise ConfigError(f"{option} must be {wanted}; got {path}, a link that leads nowhere; name another")
        if path.exists() and (not path.is_dir() if directory else not path.is_file()):
            got = "a directory" if path.is_dir() else "a file" if path.is_file() else "neither file nor directory"
            raise ConfigError(f"{option} must be {wanted}; got {path}, {got}; name another")
        if not str(path) or len(os.fsencode(path.name)) > os.pathconf("/", "PC_NAME_MAX"):
            raise ConfigError(f"{option} must be {wanted} with a name of up to 255 bytes; got {str(path)[:60]!r}")
        place = path if path.exists() else next(p for p in path.absolute().parents if os.path.lexists(p))
        in_a_directory = place.is_dir() or place == path
        writable = in_a_directory and os.access(place, os.W_OK) and not str(place.absolute()).startswith("/proc")
    except OSError as error:
        raise ConfigError(f"{option} {str(path)[:60]} cannot be written: {error.strerror}; name another") from error
    if not writable:
        rule = "may not be written to" if in_a_directory else "is not a directory"
        raise ConfigError(f"{option} {path} cannot be written: {place} {rule}; name another")


def open_to_readers(directory: Path) -> None:
    """Give the files of a directory the mode of every new file; safetensors writes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)


_OF_STORAGE = tuple(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EEXIST"),
        *("ENAMETOOLONG", "ELOOP", "ESTALE", "ENOTEMPTY", "EINVAL", "ENXIO", "ENODEV", "ENOTSUP", "EBUSY"),
    )
    if hasattr(errno, name)
)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def storage_failure(error: BaseException) -> str | None:
    """Return what went wrong with a file or directory, in words; None for an error of another kind.

    Libraries written in Rust (safetensors, tokenizers) raise classes of their own with the system's number in the text.

    >>> storage_failure(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    'runs/x/metrics.jsonl: No space left on device'
    >>> storage_failure(ValueError("x")) is None
    True
    """
    if isinstance(error, OSError) and error.errno in _OF_STORAGE:
        named = error.filename if error.filename is not None else error.filename2
        return f"{named}: {error.strerror}" if named is not None else str(error.strerror)
    found = _RUST_ERROR.search(str(error))
    if found is not None and int(found[1]) in _OF_STORAGE:
        return os.strerror(int(found[1]))
    return None


def _flush(path: Path) -> None:
    """Flush to the disk, so that a rename never gets there before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
