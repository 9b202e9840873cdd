"""Files that another process or a kill may meet: written whole or not at all, in directories with one writer."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from sapo.errors import ConfigError


def write_whole(file: Path, text: str) -> None:
    """Write a file aside, to the disk, and rename it: whoever reads it finds the old or the new one."""
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    aside.rename(file)


def lock_directory(path: Path) -> IO[str]:
    """Lock an existing directory until what is given is closed.

    Raises:
        ConfigError: another process has locked it.
        OSError: it cannot be written.
    """
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the kernel, even after a kill -9
    except OSError:
        lock.close()
        raise ConfigError(f"another process is writing {path}; wait for it or stop it") from None
    return lock
