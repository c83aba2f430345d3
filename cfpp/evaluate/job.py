"""The evaluation as a job: every finished model of a work directory, then the report."""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from etils import epath

from cfpp import paths
from cfpp.evaluate import measure, metrics, models, report, table
from cfpp.evaluate.measure import Settings, Yardstick
from cfpp.train import workdirs

STARTS_RNG, CLIPS_RNG = 0, 1  # folded into the evaluation's key


def is_reported(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> bool:
    """Whether `workdir/report` is whole: of all jobs, by the settings of `config.evaluate`."""
    folder = epath.Path(workdir) / "report"
    try:
        results = json.loads((folder / "results.json").read_text())
        made_of = [job["name"] for job in results["jobs"]], results["settings"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    is_whole = (folder / "index.html").exists()  # it is written last
    jobs = list(config.get("jobs", [epath.Path(workdir).name]))
    wanted = jobs, dataclasses.asdict(Settings(**config.evaluate))
    return is_whole and made_of == wanted


def run(workdir: epath.PathLike, settings: Settings, out: epath.PathLike | None = None) -> None:
    """Evaluates the finished models of a work directory.

    Args:
      workdir: of a stage, or of a job of several; or an export.
      settings: what to measure.
      out: a new folder for the report; None is `workdir/report`, where it may replace another.

    Raises:
      UserError: nothing has finished there, a model cannot be read or can continue nothing, the
        data are missing or too few, or the report cannot be written.
    """
    begin = time.monotonic()
    stages = models.find_stages(workdir)
    if out:
        paths.refuse_existing(out)
    folder = epath.Path(out or epath.Path(workdir) / "report")
    report.reserve(folder)
    data_config = next(iter(stages.values())).data
    yardstick = measure.prepare(data_config, settings)
    _say("ready to measure", begin)

    results = [real_row(yardstick)]
    for _, rows in itertools.groupby(models.find_rows(stages), key=lambda row: row.workdir):
        results += generated_rows(yardstick, list(rows))

    scores = [config.real_score for config in stages.values() if config.stage == "dmd"]
    perfect = None
    if len(yardstick.starts):
        perfect = metrics.expected_total_variation(metrics.DIRECTION_LAW, settings.samples)
    report.write(
        table.Report(
            data=data_config.name,
            settings=settings,
            episodes=yardstick.episodes,
            rows=results,
            actions=yardstick.actions,
            num_actions=data_config.num_actions,
            starts=len(yardstick.starts),
            jobs=[
                report.read_job(stage_workdir, config.stage, config.steps, config.batch_size)
                for stage_workdir, config in stages.items()
            ],
            real_score=scores[-1] if scores else None,
            perfect_directions=perfect,
            seconds=time.monotonic() - begin,
            machine=report.machine(),
            versions=report.versions(),
        ),
        folder,
    )
    print(f"evaluate: the report is in {folder}", flush=True)


def stored_settings(workdir: epath.PathLike) -> dict:
    """The settings with which a work directory's own job evaluates; empty where it does not."""
    if not (epath.Path(workdir) / "config.json").exists():
        return {}
    config = workdirs.read_config(workdir)
    return config.evaluate.to_dict() if "evaluate" in config else {}


def real_row(yardstick: Yardstick) -> table.Result:
    """The held-out clips themselves; in place of sampled directions, the world's own."""
    sampled = measure.true_starts(yardstick) if len(yardstick.starts) else None
    figures, by_frame = measure.figures(yardstick, yardstick.video, sampled)
    return table.Result("real", "Real data", None, figures, yardstick.video, by_frame)


def generated_rows(yardstick: Yardstick, rows: Sequence[models.Row]) -> list[table.Result]:
    """Generates with the models of rows of one stage, and measures what they make.

    With its return the stage's parameters are let go: none are held while the next are read.
    """
    results, begin = [], time.monotonic()
    for row, model in zip(rows, models.load(rows), strict=True):
        results.append(generated_row(yardstick, row, model))
        _say(row.name, begin)
        begin = time.monotonic()
    return results


def generated_row(yardstick: Yardstick, row: models.Row, model: models.Model) -> table.Result:
    """Generates with a row's model, and measures what it makes."""
    settings = yardstick.settings
    key = jax.random.key(settings.seed)
    clips = model.generate(yardstick.given, yardstick.actions, jax.random.fold_in(key, CLIPS_RNG))
    video = np.concatenate([yardstick.given, clips], axis=1)
    sampled = None
    if len(yardstick.starts) and row.stage != "bidirectional":
        sampled = sampled_starts(yardstick, model, jax.random.fold_in(key, STARTS_RNG))
    figures, by_frame = measure.figures(yardstick, video, sampled)
    figures["speed"] = models.speed(
        model, yardstick.given[0], yardstick.actions[0, : settings.context]
    )
    return table.Result(row.key, row.name, model.passes, figures, video, by_frame)


def sampled_starts(yardstick: Yardstick, model: models.Model, rng: jax.Array) -> np.ndarray:
    """Samples the frame after each start, uint8 `[S, N, H, W, 3]`.

    They are generated in batches of as many as there are episodes: the program is compiled for
    that size already.
    """
    settings = yardstick.settings
    wanted = yardstick.starts.repeat(settings.samples)
    batches = -(-len(wanted) // settings.episodes)
    episodes = np.resize(wanted, (batches, settings.episodes))
    frames = [
        model.generate(
            yardstick.given[batch],
            yardstick.actions[batch, : settings.context + 1],
            jax.random.fold_in(rng, index),
        )
        for index, batch in enumerate(episodes)
    ]
    frames = np.concatenate(frames)[: len(wanted), 0]
    return frames.reshape(len(yardstick.starts), settings.samples, *frames.shape[1:])


def _say(what: str, begin: float) -> None:
    print(f"evaluate: {what}, {time.monotonic() - begin:.1f} s", flush=True)
