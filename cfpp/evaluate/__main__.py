"""Evaluates the finished models of a work directory on held-out episodes, into a report.

python -m cfpp.evaluate --workdir=runs/quickstart
python -m cfpp.evaluate --workdir=runs/stage2 --episodes=128
"""

import dataclasses

from cfpp import paths
from cfpp.errors import ArgumentParser, exit_on_user_error
from cfpp.evaluate import Settings, job


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, and evaluates.

    Args:
      arguments: the command line without the program; that of the process if None.
    """
    parser = ArgumentParser("cfpp.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="of a stage, or of a job of several")
    parser.add_argument("--out", help="new folder for the report; default: WORKDIR/report")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=int, help=f"default: the job's own, or {field.default}"
        )
    flags = vars(parser.parse_args(arguments))
    workdir, out = paths.known(flags.pop("workdir")), flags.pop("out")
    given = {name: value for name, value in flags.items() if value is not None}
    job.run(workdir, Settings(**(job.stored_settings(workdir) | given)), out)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
