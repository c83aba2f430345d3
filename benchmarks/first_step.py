"""How far a teacher's field is from the exact one, where the arena's chance is decided.

    python benchmarks/first_step.py ten_minutes=runs/quickstart/stage1 an_hour=runs/long/stage1

From one given frame, away from walls, a ball takes each of four diagonals with probability 1/4.
Its channel of the next frame is therefore one of four known pictures m_k, and given a noisy one x,

    (1) E[x0 | x] = sum_k w_k m_k,    w = softmax(-|x - (1 - sigma) m_k|^2 / (2 sigma^2))

is exact. (A kick makes a uniform direction out of a uniform one.) Against it stand the network's
own predictions of x0, by noise level: the squared error beyond the exact one's, summed over a
ball's channel, and how much of the exact prediction's departure from the mean picture the network
makes: 1 is all of it, 0 is the mean of all directions whatever the noisy frame shows.

Writes `benchmarks/results/first_step.json`.
"""

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from cfpp import flow
from cfpp.data import arena, pipeline
from cfpp.evaluate import metrics
from cfpp.models import codec
from cfpp.train import stored

SIGMAS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.4)
CLIPS = 128  # held-out, of which those count whose balls are away from walls
DRAWS = 8  # of direction and noise, for each clip and noise level


def next_channels(states: dict, actions: np.ndarray) -> jax.Array:
    """The four possible channels of each ball after a first frame: `[clips, balls, 4, pixels]`."""
    velocities = arena.BALL_SPEED * arena.DIAGONALS[:, None]  # [4, 1, 2]
    no_kicks = np.zeros(velocities.shape[:-1], int)
    balls, _ = arena.move_balls(states["balls"][:, 0, None], velocities, no_kicks)
    agent = arena.move_agent(states["agent"][:, 0], actions[:, 1])
    frames = arena.render(np.repeat(agent[:, None], 4, 1), balls)  # [clips, 4, H, W, 3]
    channels = codec.encode(jnp.asarray(frames))[..., np.array(arena.BALL_CHANNELS)]
    return jnp.moveaxis(channels, -1, 1).reshape(len(frames), arena.NUM_BALLS, 4, -1)


def posterior_mean(x: jax.Array, means: jax.Array, sigma: float) -> jax.Array:
    """Equation (1): x `[..., pixels]`, means `[..., 4, pixels]`."""
    distance = jnp.sum(jnp.square(x[..., None, :] - (1 - sigma) * means), -1)
    weights = jax.nn.softmax(-distance / (2 * sigma**2))
    return jnp.einsum("...k,...kp->...p", weights, means)


def measure(workdir: str) -> list[dict]:
    """The table of one teacher: a row a noise level."""
    model = stored.find(workdir)
    network, params = model.network().without_unrolling(), model.load()
    clips = pipeline.test_clips(model.config.data, CLIPS, 2)
    away = metrics.away_from_walls(clips["states"]["balls"][:, 0])
    clips = jax.tree.map(lambda x: x[away], clips)
    actions = jnp.asarray(clips["actions"])
    given = codec.encode(jnp.asarray(clips["video"]))
    means = next_channels(clips["states"], clips["actions"])
    center = means.mean(-2)
    balls = np.array(arena.BALL_CHANNELS)

    @jax.jit
    def draw(params, rng, sigma):
        direction_rng, noise_rng = jax.random.split(rng)
        direction = jax.random.randint(direction_rng, means.shape[:2], 0, 4)
        truth = jnp.take_along_axis(means, direction[..., None, None], 2)[:, :, 0]
        drawn = jnp.moveaxis(truth, 1, -1).reshape(*given[:, 1].shape[:-1], -1)  # [clips, H, W, 2]
        clean = given.at[:, 1].set(given[:, 1].at[..., balls].set(drawn))
        noise = jax.random.normal(noise_rng, clean.shape)
        levels = jnp.full(clean.shape[:2], sigma)
        x = flow.interpolate(clean, noise, levels)
        v = network.teacher_forced(params, clean, {"actions": actions})(x, levels)
        channels = lambda y: jnp.moveaxis(y[:, 1][..., balls], -1, 1).reshape(truth.shape)
        exact = posterior_mean(channels(x), means, sigma)
        predicted = channels(flow.to_x0(x, v, levels))
        product = lambda a, b: jnp.sum((a - center) * (b - center))
        return {
            "exact": jnp.mean(jnp.sum(jnp.square(truth - exact), -1)),
            "beyond": jnp.mean(jnp.sum(jnp.square(predicted - exact), -1)),
            "made": product(predicted, exact),
            "whole": product(exact, exact),
        }

    rows = []
    for sigma in SIGMAS:
        draws = [draw(params, jax.random.key(number), sigma) for number in range(DRAWS)]
        mean = {name: float(np.mean([d[name] for d in draws])) for name in draws[0]}
        share = mean["made"] / mean["whole"]
        rows.append({"sigma": sigma, **{k: mean[k] for k in ("exact", "beyond")}, "share": share})
    return rows


def main() -> None:
    """Reads the command line, prints the tables and writes the results."""
    results = {}
    for name, workdir in measuring.named_workdirs(__doc__, "stage-1 runs").items():
        results[name] = measure(workdir)
        print(f"{name}\nsigma  exact error  beyond  share of the decision")
        for row in results[name]:
            print("{sigma:5}  {exact:11.2f}  {beyond:6.2f}  {share:5.2f}".format(**row))
    measuring.write("first_step", results)


if __name__ == "__main__":
    main()
