"""The report of an evaluation: a folder with README.md, index.html, pictures and videos."""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import uuid
from collections.abc import Iterator

import jax
from etils import epath

from cfpp import media, paths
from cfpp.errors import UserError
from cfpp.evaluate import metrics, pages, pictures
from cfpp.evaluate.table import Job, Report

PACKAGES = (
    "cfpp jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets clu ml-collections numpy"
).split()


def read_job(workdir: epath.Path, stage: str, steps: int, batch_size: int) -> Job:
    """A finished stage with the log in its work directory (an export has none)."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        log = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged, not JSON: {error}") from error
    return Job(workdir.name, stage, steps, batch_size, log)


def reserve(folder: epath.PathLike) -> None:
    """Sees that a report can be written to a folder, before that takes minutes, leaving no trace.

    Raises:
      UserError: it cannot.
    """
    with _writing(folder):
        paths.try_folder(folder)


def write(report: Report, folder: epath.PathLike) -> None:
    """Writes the report into a folder, in the place of one that is there; `index.html` comes last.

    One that is there stays as it is until the new one is whole, beside it.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = epath.Path(folder)
    new = folder / f"{uuid.uuid4().hex[:8]}.tmp"  # of this process alone
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writing(folder))
        stack.callback(new.rmtree, missing_ok=True)
        (new / "videos").mkdir(parents=True)
        _draw(report, new)
        (folder / "index.html").unlink(missing_ok=True)  # of another report, no longer whole
        (folder / "videos").rmtree(missing_ok=True)  # it may have had other rows
        (folder / "videos").mkdir()
        for video in (new / "videos").iterdir():
            video.replace(folder / "videos" / video.name)
        for file in sorted(new.glob("*.*"), key=lambda file: file.name == "index.html"):
            file.replace(folder / file.name)


def _draw(report: Report, folder: epath.Path) -> None:
    """Makes the files of a report."""
    media.write_image(folder / "comparison.png", pictures.comparison(report))
    if report.row("real").by_frame:
        pictures.plot_by_frame(report, folder / "by_frame.png")
    if any(job.log for job in report.jobs):
        pictures.plot_losses(report, folder / "loss.png")
    for row in report.rows:
        pictures.write_video(row.video, folder / "videos" / f"{row.key}.mp4")
    (folder / "results.json").write_text(json.dumps(_as_json(report), indent=1) + "\n")
    (folder / "README.md").write_text(pages.markdown(report))
    (folder / "index.html").write_text(pages.html_page(report))


@contextlib.contextmanager
def _writing(folder: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error})") from error


def _as_json(report: Report) -> dict:
    def figure(value: metrics.Figure) -> dict:
        error = None if math.isnan(value.error) else value.error
        return {"mean": value.mean, "error": error}

    return {
        "data": report.data,
        "settings": vars(report.settings),
        "rows": [
            {
                "key": row.key,
                "name": row.name,
                "passes": row.passes,
                "figures": {key: figure(value) for key, value in row.figures.items()},
                "by_frame": {
                    key: [figure(value) for value in values] for key, values in row.by_frame.items()
                },
            }
            for row in report.rows
        ],
        "perfect_directions": report.perfect_directions,
        "real_score": report.real_score,
        "jobs": [
            {
                "name": job.name,
                "stage": job.stage,
                "steps": job.steps,
                "batch_size": job.batch_size,
                "seconds_in_steps": job.seconds,
            }
            for job in report.jobs
        ],
        "seconds": report.seconds,
        "machine": report.machine,
        "versions": report.versions,
    }


def machine() -> str:
    """Processor, devices and system, in words."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = jax.devices()
    kind = "" if devices[0].platform == "cpu" else f"; {len(devices)} x {devices[0].device_kind}"
    return f"{processor}, {cores} cores in use{kind}; {platform.system()} {platform.release()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass  # cfpp itself, where it runs from a checkout
    return found
