"""Runs a quickstart in a new directory and records what it cost and what came out.

python benchmarks/quickstart.py            # or: smoke, long, atari, atari_gpu

Writes `benchmarks/results/quickstart[_VARIANT].json`: seconds, CPU seconds of all cores and peak
memory of the whole process, the report's table, and how fast the 2-step student streams at batch 1,
in which memory.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time

import jax

RESULTS = pathlib.Path(__file__).parent / "results"
VARIANTS = ("", "smoke", "long", "atari", "atari_gpu")


def run(variant: str, workdir: pathlib.Path) -> dict:
    """Runs the quickstart, then streams from its student; returns the figures."""
    config = "configs/quickstart.py" + (f":{variant}" if variant else "")
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cfpp.main", f"--config={config}", f"--workdir={workdir}"],
        check=True,
    )
    seconds = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    streams = {frames: stream(workdir, frames) for frames in (100, 1000)}
    said, _ = streams[1000]
    return {
        "variant": variant or "default",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "environment": {
            name: os.environ[name] for name in ("GLIBC_TUNABLES", "XLA_FLAGS") if name in os.environ
        },
        "seconds": round(seconds),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "stream_frames_per_second": float(re.search(r"then: ([\d.]+) frames/s", said).group(1)),
        "stream_first_frame_ms": float(re.search(r"first frame after: ([\d.]+)", said).group(1)),
        "stream_peak_mib": {frames: peak for frames, (_, peak) in streams.items()},
        "report": json.loads((workdir / "report" / "results.json").read_text()),
    }


def stream(workdir: pathlib.Path, frames: int) -> tuple[str, int]:
    """Streams from the student: what the command says, and its peak memory in MiB."""
    command = [sys.executable, "-m", "cfpp.rollout", f"--workdir={workdir}", f"--frames={frames}"]
    process = subprocess.Popen(
        [*command, f"--out={workdir / 'stream.mp4'}"], stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed")
    return said, usage.ru_maxrss // 2**10


def main() -> None:
    """Reads the command line and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", nargs="?", default="", choices=VARIANTS)
    parser.add_argument("--workdir", type=pathlib.Path, help="kept; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = options.workdir or pathlib.Path(temporary) / "quickstart"
        if workdir.exists():
            sys.exit(f"error: {workdir} exists; a measured run starts from nothing")
        results = run(options.variant, workdir)
    RESULTS.mkdir(exist_ok=True)
    name = "quickstart" + (f"_{options.variant}" if options.variant else "")
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print({key: value for key, value in results.items() if key != "report"})


if __name__ == "__main__":
    main()
