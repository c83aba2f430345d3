"""The library's DiT trained through its stages on clips of the linear-Gaussian world.

python -m tests.proof.networks OUT    # writes `recipe` of a world of one pixel to OUT, .npz
"""

import importlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cfpp import stages
from cfpp.data import linear_gaussian
from cfpp.data.linear_gaussian import Gaussian, World
from cfpp.models.network import Network
from cfpp.rollout import generate
from cfpp.rollout.sampler import consistency, euler
from cfpp.stages import ode
from configs import common
from tests.proof.experiments import ACTIONS, FRAMES, batch

JOBS = {"ar_diffusion": "stage1", "consistency": "stage2", "ode": "stage2_ode", "dmd": "stage3"}


def config_of(world: World, stage: str, steps: int, optimizer, **fields):
    """A stage's config, its network shrunk to fit the world."""
    config = importlib.import_module(f"configs.{JOBS[stage]}").get_config()
    config.steps = steps
    height, width, channels = world.shape
    config.data.update({"frames": FRAMES, "height": height, "width": width})
    config.data.num_actions = config.model.num_actions = len(world.pushes)
    config.model.update({"height": height, "width": width, "channels": channels, "patch": 1})
    config.model.update({"dim": 64, "ffn_dim": 128, "heads": 2, "layers": 2, "unroll": 2})
    config.model.frequency_dim = 64
    config.optimizer = optimizer
    config.shift = 1.0
    config.update(fields)
    return config


def train(world: World, config, parents, size: int, seed: int = 0):
    """Runs a stage over fresh clips in one compiled loop; returns its averaged parameters."""
    stage = stages.build(config)
    state = nn.meta.unbox(jax.jit(stage.init)(jax.random.key(seed), parents))

    @jax.jit
    def run(state, rng):
        def step(state, rng):
            data_rng, step_rng = jax.random.split(rng)
            clips, condition = batch(world, data_rng, size)
            return stage.step(state, {"video": clips} | condition, step_rng)[0], None

        return jax.lax.scan(step, state, jax.random.split(rng, config.steps))[0]

    return run(state, jax.random.key(seed + 1)).ema


def rollouts(config, params, sampler, actions, size: int, seed: int = 0) -> np.ndarray:
    """Clips `[size, F, D]` that the network rolls out from noise, all with the same actions."""
    network = Network.create(config.model, config.pattern).without_unrolling()
    actions = jnp.tile(np.asarray(actions), (size, 1))
    clips = rolled_out(generate.Rollout(network, sampler), params, actions, jax.random.key(seed))
    return np.asarray(clips).reshape(*actions.shape, -1)


@jax.jit
def rolled_out(rollout: generate.Rollout, params, actions: jax.Array, rng: jax.Array) -> jax.Array:
    """Clips from noise, `[size, F, H, W, C]`; samplers of one kind share what is compiled."""
    dit, (size, frames) = rollout.network.dit, actions.shape
    empty = jnp.zeros((size, 0, dit.height, dit.width, dit.channels))
    stream = rollout.start(params, empty, {"actions": actions[:, :0]}, frames)
    noise = generate.gaussian_noise(rng, stream.pending[:, 0].shape)
    sigmas, last = rollout.sampler.of_chunks(frames)
    condition = {"actions": actions}
    return rollout.unroll(params, stream, condition, noise, sigmas, last)[1].x0


def deviations(clips: np.ndarray, law) -> dict[str, np.ndarray]:
    """How far the mean and the covariance of each frame are from a law's, `[F]`.

    mean: the largest difference, in standard deviations. covariance: the norm of the difference
    relative to the norm.
    """
    frames, size = clips.shape[1:]
    mean = np.asarray(law.mean).reshape(frames, size)
    own = np.asarray(law.covariance).reshape(frames, size, frames, size)
    own = np.stack([own[i, :, i] for i in range(frames)])
    got = np.stack([np.cov(clips[:, i].T) for i in range(frames)])
    spread = np.sqrt(own.diagonal(axis1=1, axis2=2))
    norm = lambda x: np.linalg.norm(x, axis=(1, 2))
    return {
        "mean": np.max(np.abs(clips.mean(0) - mean) / spread, 1),
        "covariance": norm(got - own) / norm(own),
        "variance": np.trace(got, axis1=1, axis2=2) / np.trace(own, axis1=1, axis2=2),
    }


def solved(world: World, actions, grid: np.ndarray) -> Gaussian:
    """The law of clips that the exact causal teacher makes by Euler's method on `grid`.

    From noise the solver adds the mean exactly, as that moves on a straight line; the rest of a
    frame's law is what the solver makes of unit vectors.
    """
    unit = jnp.eye(world.size)[:, None]
    frames = []
    for i, action in enumerate(actions):
        law = world.conditional(i, action)
        centred = Gaussian(jnp.zeros(world.size), law.covariance)
        root = ode.trajectory(centred.velocity, unit, jnp.asarray(grid))[-1][:, 0]
        frames.append(law._replace(covariance=root.T @ root))
    return linear_gaussian.chain(frames)


def recipe(world: World, actions, size: int = 64, clips: int = 8192) -> dict[str, np.ndarray]:
    """Stages 1, 2 and 3 from nothing; clips `[clips, F, D]` of each stage's model by name.

    The teacher takes 48 Euler steps a frame; students the 2 that stage 3 trains them for, and 1.
    """
    teacher = config_of(world, "ar_diffusion", 2500, common.muon(0.02, 2e-3), draws=4)
    teacher.resample.rate = 0.0  # what is exact is so after clean frames
    student = config_of(world, "consistency", 800, common.muon(0.005, 5e-4), draws=2)
    student.update({"grid_steps": 24, "grid_doublings": 0, "solver": "heun"})
    final = config_of(world, "dmd", 150, common.optimizer("adamw", 1e-4), given=0)
    for config in (teacher, student):
        config.optimizer.final_fraction = 0.01
    final.optimizer.b1 = 0.0
    trained = {}
    trained["teacher"] = train(world, teacher, {}, size)
    trained["CD"] = train(world, student, {"teacher": trained["teacher"]}, size)
    parents = {"student": trained["CD"], "real": trained["teacher"]}
    trained["DMD"] = train(world, final, parents, size)
    few = {f"{k} step" + "s" * (k > 1): consistency(k, 1.0) for k in (1, 2)}
    samplers = {"teacher": {"48 steps": euler(48, 1.0)}, "CD": few, "DMD": few}
    return {
        f"{name}, {steps}": rollouts(teacher, params, sampler, actions, clips)
        for name, params in trained.items()
        for steps, sampler in samplers[name].items()
    }


if __name__ == "__main__":
    np.savez(sys.argv[1], **recipe(linear_gaussian.example(pixels=1), ACTIONS))
