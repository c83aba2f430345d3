"""The one exception that a user of cfpp is meant to see."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A fault that the user can mend, told in one line.

    The message says what is wrong, where, and what would be right.
    """


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
