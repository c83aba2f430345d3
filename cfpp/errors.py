"""The one exception that a user of cfpp is meant to see, and the command lines that raise it."""

import argparse
import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class UserError(Exception):
    """A fault that the user can mend, told in one line.

    The message says what is wrong, where, and what would be right.
    """


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, what that was raised from, and so on."""
    while error is not None:
        yield error
        before = None if error.__suppress_context__ else error.__context__  # `from None`
        error = error.__cause__ or before


def one_line(error: Exception) -> str:
    """What an exception says, without line breaks."""
    return " ".join(str(error).split())


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def how_to_install(extra: str) -> str:
    """What installs the packages of an extra. (The `cfpp` of PyPI is another project.)"""
    return f"pip install -c constraints.txt -e '.[{extra}]' in the folder of cfpp"


@contextlib.contextmanager
def exit_on_user_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2, without a traceback.

    Ctrl-C becomes the line `interrupted`, and exit code 1.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        leave(1)


def leave(code: int) -> NoReturn:
    """Ends the process, whatever it is at, once what is open has been closed.

    That comes before all else that Python does at its end: XLA may compile or compute on, in
    threads of its own, and would crash where that takes away what it needs.
    """

    def end():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)
    sys.exit(code)


class ArgumentParser(argparse.ArgumentParser):
    """Of `python -m PROGRAM`: tells a mistake in one line, as all else is told.

    Args:
      program: the module that is run.
      description: its docstring, shown as it is by --help.
    """

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Reads the command line: refuses an empty option, such as `--out=$UNSET`.

        It also expands `~` after `=`, which no shell does.
        """
        options = super().parse_args(args, namespace)
        for name, value in vars(options).items():
            if value == "" and self.get_default(name) != "":
                self.error(f"--{name} is empty; give it a value")
            if isinstance(value, str):
                setattr(options, name, os.path.expanduser(value))
        return options

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        raise UserError(message)
