"""Distribution matching with exact scores: its fixed point, its gradient, and where it leads.

The student makes each frame in one step, x^i = G e^i + H x^{i-1} + c(u_i), on its own history
without gradient, as stage 3 does. Its law is then known, and with it the score of a perfect critic.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.data.linear_gaussian import Affine, Gaussian
from cfpp.rollout.sampler import consistency
from cfpp.stages import dmd
from tests.proof import experiments
from tests.proof.experiments import ACTIONS, FRAMES

pytestmark = pytest.mark.usefixtures("float64")

WORLD = linear_gaussian.example()
SIZE = WORLD.size
LATENTS = (FRAMES, *WORLD.shape)


def clip_field(law):
    """The velocity field of a law of whole clips, over latents at one level a clip."""
    return lambda x, sigma: law.velocity(x.reshape(len(x), -1), sigma[:, 0]).reshape(x.shape)


def exact_student():
    """G, H and c of the first frame and of later ones, where the student's law is the true one."""
    first, later = WORLD.affine(1.0, 0, 0), WORLD.affine(1.0, 1, 0)
    return {
        "first": {"of_x": first.of_x, "constant": first.constant},
        "later": {"of_x": later.of_x, "of_history": later.of_history},
        "pushes": jnp.asarray(WORLD.pushes),
    }


def shifted_student():
    """Every number of the exact student off by some 0.2."""
    leaves, tree = jax.tree.flatten(exact_student())
    rng = np.random.default_rng(0)
    return tree.unflatten(leaf + 0.2 * rng.standard_normal(leaf.shape) for leaf in leaves)


def maps(params):
    """The student's map of each frame, `[F]`."""
    out = [Affine(params["first"]["of_x"], jnp.zeros((SIZE, 0)), params["first"]["constant"])]
    for i, action in enumerate(ACTIONS[1:]):
        older = jnp.zeros((SIZE, i * SIZE))
        of_history = jnp.concatenate([older, params["later"]["of_history"]], 1)
        out.append(Affine(params["later"]["of_x"], of_history, params["pushes"][action]))
    return out


def law_of(params) -> Gaussian:
    return linear_gaussian.rollout([[fn] for fn in maps(params)], [1.0])


def roll_out(params, noise):
    """Clips `[B, F, H, W, C]` from noise; the history carries no gradient."""
    history = jnp.zeros((len(noise), 0))
    frames = []
    for fn, e in zip(maps(params), jnp.moveaxis(noise, 1, 0), strict=True):
        frames.append(fn(e.reshape(len(e), SIZE), history))
        history = jnp.concatenate([history, jax.lax.stop_gradient(frames[-1])], 1)
    return jnp.stack(frames, 1).reshape(noise.shape)


def scores(kind, params, x):
    """Exact velocity fields of the data and of the student, as stage 3 binds them."""
    condition = {"actions": jnp.tile(ACTIONS, (len(x), 1))}
    if kind == "bidirectional":
        return WORLD.bidirectional(condition), clip_field(law_of(params))
    flat = x.reshape(len(x), FRAMES, SIZE)
    fns = maps(params)
    means = [
        fn(jnp.zeros((len(x), SIZE)), flat[:, :i].reshape(len(x), i * SIZE))
        for i, fn in enumerate(fns)
    ]
    own = Gaussian(jnp.stack(means, 1), jnp.stack([fn.of_x @ fn.of_x.T for fn in fns]))
    fake = lambda x, sigma: own.velocity(x.reshape(flat.shape), sigma).reshape(x.shape)
    return WORLD.teacher_forced(x, condition), fake


def draw(rng, batch, kind):
    """Noise of the rollout, noise of the scores, and their levels."""
    first, second, third = jax.random.split(rng, 3)
    noise, score_noise = (jax.random.normal(key, (batch, *LATENTS)) for key in (first, second))
    levels = FRAMES if kind == "causal" else 1
    sigma = jax.random.uniform(third, (batch, levels), minval=0.02, maxval=0.98)
    return noise, score_noise, jnp.broadcast_to(sigma, (batch, FRAMES))


@pytest.mark.parametrize("kind", dmd.REAL_SCORES)
def test_true_law_is_a_fixed_point(kind):
    """No gradient for any clip; the scale of x0 is 1, its rounding in float64 1e-12 at most."""
    params = exact_student()
    noise, score_noise, sigma = draw(jax.random.key(0), 64, kind)
    x = roll_out(params, noise)
    real, fake = scores(kind, params, x)
    assert np.abs(dmd.gradient(real, fake, x, score_noise, sigma)).max() < 1e-10
    real, fake = scores(kind, shifted_student(), x)
    assert np.abs(dmd.gradient(real, fake, x, score_noise, sigma)).max() > 0.1


@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_gradient_is_that_of_the_divergence(sigma):
    """Undone the normalisation, it is sigma^2 / (1 - sigma)^2 of the noised KL's gradient.

    For x = m + L e with any m and L: E[x0 | x_sigma] = (x_sigma + sigma^2 score) / (1 - sigma), and
    d x_sigma = (1 - sigma) dx. By Monte Carlo, within 5 standard errors.
    """
    batch = 20000
    start = law_of(shifted_student())
    theta = start.mean, jnp.linalg.cholesky(start.covariance)
    true = WORLD.law(ACTIONS).noised(sigma)

    def divergence(theta):
        return Gaussian(theta[0], theta[1] @ theta[1].T).noised(sigma).divergence(true)

    noise, score_noise, _ = draw(jax.random.key(0), batch, "bidirectional")
    flat = noise.reshape(batch, -1)
    generate = lambda theta, e: (theta[0] + theta[1] @ e).reshape(1, *LATENTS)
    x = jax.vmap(generate, (None, 0))(theta, flat)[:, 0]
    level = jnp.full((batch, FRAMES), sigma)
    real, fake = clip_field(WORLD.law(ACTIONS)), clip_field(start)
    g = dmd.gradient(real, fake, x, score_noise, level)
    x_sigma = flow.interpolate(x, score_noise, level)
    x0_real = flow.to_x0(x_sigma, real(x_sigma, level), level)
    g = g * jnp.mean(jnp.abs(x - x0_real), (1, 2, 3, 4), keepdims=True)

    @functools.partial(jax.vmap, in_axes=(0, 0))
    def of_clip(e, g):
        total = lambda theta: SIZE * jnp.sum(dmd.loss(generate(theta, e), g[None]))
        return jax.grad(total)(theta)

    expected = jax.grad(divergence)(theta)
    for got, exact in zip(jax.jit(of_clip)(flat, g), expected, strict=True):
        experiments.within_standard_errors(got, sigma**2 / (1 - sigma) ** 2 * exact)


def recover(kind, steps=1500, batch=64, rate=0.02):
    """Stage 3's student steps with a perfect critic: the divergence from the truth, `[steps]`."""
    transform = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.01), b1=0.0)
    truth = WORLD.law(ACTIONS)

    def step(carry, rng):
        params, state = carry
        noise, score_noise, sigma = draw(rng, batch, kind)
        x = roll_out(params, noise)
        g = dmd.gradient(*scores(kind, params, x), x, score_noise, sigma)
        loss = lambda params: jnp.mean(dmd.loss(roll_out(params, noise), g))
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), law_of(params).divergence(truth)

    params = shifted_student()
    rngs = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, rngs))((params, transform.init(params)))


@pytest.mark.parametrize("kind", dmd.REAL_SCORES)
def test_a_shifted_student_is_moved_back(kind):
    """From more than 1 nat to 1e-3 or less.

    The divergence is quadratic in the errors of the student's numbers: 1e-3 is left of 1 nat where
    these have fallen from 0.2 to 0.006, which is thirty of Adam's last steps, of 2e-4.
    """
    (params, _), divergence = recover(kind)
    assert divergence[0] > 1
    assert law_of(params).divergence(WORLD.law(ACTIONS)) < 1e-3


@pytest.mark.parametrize("first_steps, pairs", [(2, 2), (4, 4 * 2)])
def test_exits(first_steps, pairs):
    """Each step as often as any other; the first chunk's own only where it takes other steps."""
    keys, sampler = jax.random.split(jax.random.key(0), 4000), consistency(2, 1.0, first_steps)
    exits = np.asarray(jax.vmap(lambda key: dmd.draw_exits(key, sampler, 3))(keys))
    assert (exits[:, 1] == exits[:, 2]).all()
    assert (exits[:, 0] == exits[:, 1]).all() == (first_steps == 2)
    found, counts = np.unique(exits[:, :2], axis=0, return_counts=True)
    assert len(found) == pairs
    np.testing.assert_allclose(counts / len(keys), 1 / pairs, atol=0.03)
