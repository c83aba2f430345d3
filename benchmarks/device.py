"""All that is measured on a GPU, in one command, within some minutes.

    python benchmarks/device.py                    # attention.py and rollout.py
    python benchmarks/device.py Causal-Forcing     # then public_code.py, of this clone

Each program has an equal share of the time that is left when it starts, so that what one does not
need is the next one's. One whose share is over is stopped: its result file has what was measured.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import measuring

from cfpp.errors import exit_on_user_error

FOLDER = pathlib.Path(__file__).parent


def main() -> int:
    """Runs the programs; returns how many of them did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkout", nargs="?", type=pathlib.Path, help="a clone of thu-ml/Causal-Forcing"
    )
    parser.add_argument("--minutes", type=float, default=8, help="in all (%(default)s)")
    options = parser.parse_args()
    programs = [["attention.py"], ["rollout.py"]]
    if options.checkout:
        measuring.check_public_code(options.checkout)  # now, and not when the others have run
        programs.append(["public_code.py", options.checkout])

    deadline, failed = time.monotonic() + 60 * options.minutes, 0
    for done, (program, *arguments) in enumerate(programs):
        share = (deadline - time.monotonic()) / (len(programs) - done)
        print(f"{program}: at most {share:.0f} s", flush=True)
        try:
            command = [sys.executable, FOLDER / program, *arguments]
            failed += subprocess.run(command, timeout=share).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{program}: stopped, its time was over", flush=True)
            failed += 1
    return failed


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
