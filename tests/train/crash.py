"""Kills a run again and again, at random moments, until it is through; another one is left alone.

    python -m tests.train.crash KILLED UNDISTURBED SEED

Each start is a fork of this process, which has the modules but no device yet: seconds saved each.
"""

import os
import pathlib
import random
import signal
import sys
import time

import jax

from cfpp.train import items, jobs
from tests.train import fake

DIM = 256
CHANGES = {"steps": 30, "save_every": 1, "log_every": 1, "model": {"dim": DIM}}
KILLS = 5


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def newest(workdir: pathlib.Path) -> int:
    return max(items.steps(workdir / "checkpoints"), default=0)


def start(workdir: pathlib.Path) -> int:
    child = os.fork()
    if child == 0:
        for patch in fake.patches(DIM):
            patch.start()
        jobs.run(fake.config(**CHANGES), workdir)
        os._exit(0)
    return child


def wait_until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the run does not come on"
        time.sleep(0.002)


def main(workdir: pathlib.Path, undisturbed: pathlib.Path, seed: int) -> None:
    draw = random.Random(seed)
    reached = 0
    for kill in range(KILLS):
        child = start(workdir)
        if kill:
            reached = newest(workdir) + draw.randint(1, 3)
            wait_until(lambda reached=reached: newest(workdir) >= reached)
        time.sleep(draw.uniform(0, 0.3))
        if kill % 2:
            wait_until(lambda: unfinished(workdir))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it was through already"
        print(f"killed after {newest(workdir)}, {len(unfinished(workdir))} unfinished", flush=True)
    for child in (start(workdir), start(undisturbed)):
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


if __name__ == "__main__":
    sys.modules["tensorflow"] = None  # takes seconds to import, and has no part in this
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))
