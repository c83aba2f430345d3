r"""At which noise level a student takes the second of two steps, and what it makes of it.

    python benchmarks/second_step.py ten_minutes=runs/quickstart/stage2 an_hour=runs/long/stage2 \
        gpu=runs/gpu/stage2 boxing_on_two_cores=runs/atari/stage2

A consistency student may take its second step from any noise level: high, and the step decides anew
what chance decides; low, and it only cleans the picture that the first step has made. The students
are measured as in their report, on twice as many episodes, at two steps in all frames and at each
of `SIGMAS`; and at one step, which is sigma 1.

Writes `benchmarks/results/second_step.json`, where what has another name stays.
"""

import jax
import measuring
import numpy as np

from cfpp import flow
from cfpp.evaluate import measure
from cfpp.rollout import generate
from cfpp.rollout.sampler import Sampler
from cfpp.train import stored

SIGMAS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
SETTINGS = measure.Settings(episodes=128, probe_steps=1)  # no figure here needs the probe
SHOWN = ("intact_1", "intact_4", "intact_9", "intact_12", "directions", "agent_error", "frechet")


def figures_of(workdir: str) -> list[dict]:
    """The table of one student: a row a noise level, each figure with its standard error."""
    model = stored.find(workdir)
    config, params = model.config, model.load()
    yardstick = measure.prepare(config.data, SETTINGS)
    rollout = generate.for_stage(model.network(), config, 2)
    starts = yardstick.starts.repeat(SETTINGS.samples)

    def row(sigma):
        levels = (1.0, sigma, 0.0) if sigma < 1 else (1.0, 0.0)
        sampler = Sampler.create(levels, levels, flow.consistency_step)

        def sampled(given, actions, seed):
            clip = rollout.replace(sampler=sampler).clip
            return np.asarray(clip(params, given, {"actions": actions}, jax.random.key(seed)))

        video = sampled(yardstick.given, yardstick.actions, 0)
        video = np.concatenate([yardstick.given, video], axis=1)
        samples = None
        if len(starts):
            frames = sampled(yardstick.given[starts], yardstick.actions[starts, :2], 1)[:, 0]
            samples = frames.reshape(-1, SETTINGS.samples, *frames.shape[1:])
        found, _ = measure.figures(yardstick, video, samples)
        pairs = {k: (float(found[k].mean), float(found[k].error)) for k in SHOWN if k in found}
        return {"sigma": sigma} | pairs

    return [row(sigma) for sigma in (1.0, *SIGMAS)]


def main() -> None:
    """Reads the command line, prints the tables and writes the results."""
    results = measuring.read("second_step")
    for name, workdir in measuring.named_workdirs(__doc__, "stage-2 or -3 runs").items():
        results[name] = figures_of(workdir)
        columns = [column for column in SHOWN if column in results[name][0]]
        print(name, "sigma", *(f"{column:>13}" for column in columns))
        for row in results[name]:
            values = (f"{row[k][0]:7.3f} ±{row[k][1]:5.3f}" for k in columns)
            print(f"{'':{len(name)}} {row['sigma']:5}", *values, flush=True)
    measuring.write("second_step", results)


if __name__ == "__main__":
    main()
