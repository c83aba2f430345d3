"""Trains a stage, or runs a job of several stages and its evaluation.

python -m cfpp.main --config=configs/stage1.py --workdir=runs/stage1
python -m cfpp.main --config=configs/stage2.py:atari,chunk=3 --workdir=DIR --config.steps=500

The same command continues what was interrupted. What takes long to import is imported late: a
mistake on the command line is told at once.
"""

import signal

from absl import app, flags, logging

from cfpp import command_line
from cfpp.errors import UserError, exit_on_user_error, leave

flags.DEFINE_string("workdir", None, "Working directory; made if missing.")
flags.DEFINE_bool("profile", False, "Record some steps for TensorBoard's profiler.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where there are several.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_float("join_timeout", 300.0, "Seconds that processes may take to come together.")


def parse(argv: list[str]) -> list[str]:
    """Parses the command line, for `absl.app`.

    Returns:
      What is left over: the program.

    Raises:
      UserError: a mistake in it.
    """
    left_over = command_line.parse(argv)
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing; give the directory for checkpoints and metrics")
    if not flags.FLAGS.join_timeout > 0:
        raise UserError(
            f"--join_timeout is {flags.FLAGS.join_timeout:g}; give seconds, more than 0"
        )
    return left_over


def _leave(*_) -> None:
    print("interrupted; run the same command to continue", flush=True)
    leave(0)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    del argv
    if not flags.FLAGS["verbosity"].present:  # Orbax tells much of itself
        logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, _leave)  # while there is nothing to save
    from cfpp.parallel import hosts
    from cfpp.train import jobs

    hosts.join(
        flags.FLAGS.coordinator_address,
        flags.FLAGS.num_processes,
        flags.FLAGS.process_id,
        flags.FLAGS.join_timeout,
    )
    with hosts.ending_together():
        jobs.run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.profile)


if __name__ == "__main__":
    with exit_on_user_error("interrupted; run the same command to continue"):
        app.run(main, flags_parser=parse)
