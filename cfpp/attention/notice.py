"""What attention tells its user: which implementation it has picked."""

import functools
import sys

from cfpp.parallel import hosts


@functools.cache
def say_once(line: str) -> None:
    """Prints a line, the first time that it is given one and in the first process alone.

    To stderr: stdout is for what programs tell of their results.
    """
    if hosts.is_first():
        print(line, file=sys.stderr, flush=True)
