"""Files and folders that appear at once and whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of the errors that mean a full disk, a used-up quota or a limit on the size of a file."""


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file; a reader, or a crash, finds the old one or the new one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file; a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; a folder of that name is replaced."""
    if final.exists():
        outdated = final.with_name(f".{final.name}.old.part")
        shutil.rmtree(outdated, ignore_errors=True)
        os.rename(final, outdated)
        os.rename(temporary, final)
        shutil.rmtree(outdated)
    else:
        os.rename(temporary, final)
    sync(final.parent)


def remove_parts(folder: Path) -> None:
    """Remove what interrupted writing has left in a folder."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
