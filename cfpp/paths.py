"""Paths on disks and in buckets, such as gs://bucket/folder."""

import os

from etils import epath

from cfpp.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket and not on a disk."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root on, without '..' and with the home directory for '~'.

    In a bucket too: `epath` and `os.path` would look for it in the current directory.
    """
    scheme, colon, rest = os.fspath(path).rpartition("://")
    whole = os.path.normpath(rest) if scheme else os.path.abspath(os.path.expanduser(rest))
    return epath.Path(scheme + colon + whole)


def refuse_existing(path: epath.PathLike) -> None:
    """Raises UserError if there is something, so that nothing is overwritten."""
    if epath.Path(path).exists():
        raise UserError(f"{path} exists and is not overwritten; choose another folder")


def replace_text(path: epath.PathLike, text: str) -> None:
    """Writes a file; a crash leaves either the old one or the new one."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
