"""Writes the model of a stage without its training state, to roll out from or to start from.

python -m cfpp.export --workdir=runs/stage2 --out=models/student
"""

from cfpp.errors import ArgumentParser, exit_on_user_error


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, and exports.

    Args:
      arguments: the command line without the program; that of the process if None.
    """
    parser = ArgumentParser("cfpp.export", __doc__)
    parser.add_argument("--workdir", required=True, help="of a stage, or of a job of several")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of nearly all weights (%(default)s); bfloat16 is half the size, and to a model that "
        "computes in it the same",
    )
    flags = parser.parse_args(arguments)

    from cfpp.train import stored  # late: a mistake on the command line is told at once

    stored.export(flags.workdir, flags.out, flags.dtype)
    print(f"exported {flags.workdir} to {flags.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
