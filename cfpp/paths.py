"""Paths on disks and in buckets, such as gs://bucket/folder."""

import errno
import os
import tempfile

from etils import epath

from cfpp.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket and not on a disk."""
    return "://" in os.fspath(path)


def known(path: epath.PathLike) -> epath.Path:
    """The path, as one whose files can be read and written.

    Raises:
      UserError: it begins like a bucket's, but with no store that `epath` knows.
    """
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(
            f"{path}: {error.args[0]!r} is no store that is known here; give a folder, or a "
            "bucket such as gs://bucket/folder"
        ) from error


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root on, without '..' and with the home directory for '~'.

    In a bucket too: `epath` and `os.path` would look for it in the current directory.

    Raises:
      UserError: it is in no store that is known.
    """
    scheme, colon, rest = os.fspath(path).rpartition("://")
    whole = os.path.normpath(rest) if scheme else os.path.abspath(os.path.expanduser(rest))
    return known(scheme + colon + whole)


def refuse_patterns(folder: epath.PathLike) -> None:
    """Raises UserError if Orbax would take the path of a folder of checkpoints for a pattern.

    It looks for the parts of what it writes by one, and would leave them where it finds none.
    """
    if found := set(os.fspath(absolute(folder))) & set("[]\\"):
        raise UserError(
            f"{folder}: checkpoints cannot be kept in a folder with {' and '.join(sorted(found))} "
            "in its path; choose another"
        )


def refuse_existing(path: epath.PathLike) -> None:
    """Raises UserError if there is something, so that nothing is overwritten."""
    if known(path).exists() or os.path.lexists(path):  # a link that leads nowhere, too
        raise UserError(f"{path} exists and is not overwritten; choose another folder")


def check_file(path: epath.PathLike) -> None:
    """Raises UserError if a file cannot be written there, as far as its name tells."""
    path = known(path)
    if is_remote(path):
        return  # buckets have no folders
    if path.is_dir():
        raise UserError(f"{path} is a directory; a file name was expected")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a directory, so {path.name} cannot be written there")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: permission denied; give another file")


def try_folder(folder: epath.PathLike) -> None:
    """Sees that a folder can be written, or made, and leaves it as it is.

    Raises:
      OSError: it can not; its `filename` is what is in the way, or the folder.
    """
    if is_remote(folder):
        return  # buckets have no folders
    folder = place = absolute(folder)
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def replace_text(path: epath.PathLike, text: str) -> None:
    """Writes a file; a crash leaves either the old one or the new one."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
