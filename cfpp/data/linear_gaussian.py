"""A linear-Gaussian video process: everything that cfpp learns is known in closed form on it.

A frame is a vector x of D values, u_i the action that led to frame i:

    (1) x^1 ~ N(0, I),   x^i | x^{i-1} ~ N(A x^{i-1} + b u_i, S)

Noised to level s, a Gaussian N(m, C) has mean (1 - s) m and covariance C_s = (1 - s)^2 C + s^2 I.
Its velocity field, and the map by which its probability-flow ODE carries level s to level t, are

    (2) v(x, s)    = (s I - (1 - s) C) C_s^{-1} (x - (1 - s) m) - m
    (3) f_t(x, s)  = (1 - t) m + C_t^{1/2} C_s^{-1/2} (x - (1 - s) m)

With N(A x^{i-1} + b u_i, S) for N(m, C) these are the fields of an exact autoregressive teacher,
with the joint law of all frames those of an exact bidirectional one. Derivations: `docs/proof.md`.

Arrays are JAX's and of its precision: float64 within `jax.enable_x64(True)`.

Dimension letters: B batch, F frames, D values of a frame.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cfpp import flow
from cfpp.models.network import Condition

Map = Callable[[jax.Array, jax.Array], jax.Array]  # (x_sigma, sigma) -> x at another level


def _noised(variance, sigma):
    """The variance of x_sigma along a direction in which that of x0 is `variance`."""
    return jnp.square(1 - sigma) * variance + jnp.square(sigma)


class Gaussian(flax.struct.PyTreeNode):
    """Normal laws of n values, one or a batch.

    Attributes:
      mean: `[..., n]`.
      covariance: `[..., n, n]`; its leading axes broadcast against the mean's.
    """

    mean: jax.Array
    covariance: jax.Array

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Equation (2): E[noise - x0 | x_sigma = x], for x `[..., n]` and sigma `[...]`."""
        ratio = lambda values, s: (s - (1 - s) * values) / _noised(values, s)
        return self._apply(ratio, x, sigma) - self.mean

    def flow(self, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array = 0.0) -> jax.Array:
        """Equation (3): where the ODE carries x `[..., n]` from `sigma` to `sigma_next`."""
        level = jnp.asarray(sigma_next)[..., None]
        ratio = lambda values, s: jnp.sqrt(_noised(values, level) / _noised(values, s))
        return self._apply(ratio, x, sigma) + (1 - level) * self.mean

    def given(self, known: int, values: jax.Array) -> "Gaussian":
        """The law of the other values where the first `known` ones are `values`."""
        a, b = np.s_[:known], np.s_[known:]
        cov = self.covariance
        gain = jnp.linalg.solve(cov[a, a], cov[a, b]).T
        mean = self.mean[b] + gain @ (values - self.mean[a])
        return Gaussian(mean, cov[b, b] - gain @ cov[a, b])

    def divergence(self, other: "Gaussian") -> jax.Array:
        """The Kullback-Leibler divergence KL(self | other)."""
        shift = other.mean - self.mean
        ratio = jnp.linalg.solve(other.covariance, self.covariance)
        distance = shift @ jnp.linalg.solve(other.covariance, shift)
        return 0.5 * (jnp.trace(ratio) - len(shift) + distance - jnp.linalg.slogdet(ratio)[1])

    def noised(self, sigma: jax.Array) -> "Gaussian":
        """The law of x_sigma."""
        identity = jnp.eye(self.mean.shape[-1])
        cov = jnp.square(1 - sigma) * self.covariance + jnp.square(sigma) * identity
        return Gaussian((1 - sigma) * self.mean, cov)

    def _apply(self, ratio, x, sigma):
        """g(C) (x - (1 - sigma) m), for g = `ratio` of the eigenvalues."""
        sigma = jnp.asarray(sigma)[..., None]
        values, vectors = jnp.linalg.eigh(self.covariance)
        y = jnp.einsum("...nk,...n->...k", vectors, x - (1 - sigma) * self.mean)
        return jnp.einsum("...nk,...k->...n", vectors, ratio(values, sigma) * y)


class Affine(NamedTuple):
    """A map of a noisy frame to a clean one, given all frames before it, for one action.

        (4) f(x, h) = of_x x + of_history h + constant

    Attributes:
      of_x: `[D, D]`.
      of_history: `[D, i * D]`, over frames 0 .. i - 1, one after another.
      constant: `[D]`.
    """

    of_x: jax.Array
    of_history: jax.Array
    constant: jax.Array

    def __call__(self, x: jax.Array, history: jax.Array) -> jax.Array:
        """Equation (4), for x `[..., D]` and history `[..., i * D]`."""
        return x @ self.of_x.T + history @ self.of_history.T + self.constant


class Conditional(NamedTuple):
    """The law of a frame given all frames before it: N(of_history h + constant, covariance)."""

    of_history: jax.Array
    constant: jax.Array
    covariance: jax.Array


def chain(conditionals: Sequence[Conditional]) -> Gaussian:
    """The joint law of frames, each drawn given all before it: a Gaussian over F * D values."""
    mean = conditionals[0].constant[:0]
    cov = conditionals[0].covariance[:0, :0]
    for of_history, constant, own in conditionals:
        cross = of_history @ cov
        mean = jnp.concatenate([mean, of_history @ mean + constant])
        cov = jnp.block([[cov, cross.T], [cross, cross @ of_history.T + own]])
    return Gaussian(mean, cov)


def sampled(maps: Sequence[Affine], sigmas: Sequence[float]) -> Conditional:
    """The law of a frame by the consistency sampler, given all frames before it.

    Step k puts `maps[k]` on the frame noised to `sigmas[k]`; the first one on pure noise. With
    x0 ~ N(P h + q, R) after a step, the next level s and its map G x + H h + c lead to

        (5) P <- (1 - s) G P + H,  q <- (1 - s) G q + c,  R <- G ((1 - s)^2 R + s^2 I) G^T
    """
    first = maps[0]
    law = Conditional(first.of_history, first.constant, first.of_x @ first.of_x.T)
    for step, s in zip(maps[1:], sigmas[1:], strict=True):
        gain = (1 - s) * step.of_x
        noise = s * step.of_x
        law = Conditional(
            gain @ law.of_history + step.of_history,
            gain @ law.constant + step.constant,
            gain @ law.covariance @ gain.T + noise @ noise.T,
        )
    return law


def rollout(maps: Sequence[Sequence[Affine]], sigmas: Sequence[float]) -> Gaussian:
    """The law of a clip that a student rolls out on its own frames by the consistency sampler.

    Args:
      maps: of each frame, of each step: `[F][K]`.
      sigmas: the levels of the K steps, from 1 on.

    Returns:
      A Gaussian over F * D values.
    """
    return chain([sampled(steps, sigmas) for steps in maps])


def regression(law: Gaussian, sigma: float, frame: int, size: int) -> tuple[Affine, jax.Array]:
    """The minimiser of ODE regression onto a bidirectional teacher.

    Such a teacher carries noise e of *all* frames to a clip x0 = m + C^{1/2} e, by way of
    x_sigma = (1 - sigma) m + C_sigma^{1/2} e. A causal student sees of these the clean frames
    before its own, h, and its own noisy frame. The mean squared error is least for

        (6) f(x_sigma^i, h) = E[x0^i | x_sigma^i, h]

    which is the regression of one Gaussian on others. (Frames are counted from 0.)

    Args:
      law: of whole clips, F * D values.
      sigma: the noise level of x.
      frame: i, the frame to predict.
      size: D, values of a frame.

    Returns:
      The map, and the covariance of x0^i about it `[D, D]`: the variance that it loses.
    """
    values, vectors = jnp.linalg.eigh(law.covariance)
    spectral = lambda scale: (vectors * scale) @ vectors.T
    clean = spectral(jnp.sqrt(values))  # of e
    noisy = spectral(jnp.sqrt(_noised(values, sigma)))
    history, own = np.s_[: frame * size], np.s_[frame * size : (frame + 1) * size]
    seen = jnp.concatenate([noisy[own], clean[history]])
    gain = jnp.linalg.solve(seen @ seen.T, seen @ clean[own].T).T
    of_x, of_history = gain[:, :size], gain[:, size:]
    mean = law.mean
    constant = mean[own] - (1 - sigma) * of_x @ mean[own] - of_history @ mean[history]
    residual = clean[own] - gain @ seen
    return Affine(of_x, of_history, constant), residual @ residual.T


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The process of equation (1), and what exact networks would compute on it.

    The methods mirror those of `cfpp.models.network.Network`: fields over latents
    `[B, F, height, width, channels]`, with everything else bound.

    Attributes:
      transition: A, float64 `[D, D]`.
      pushes: b u for each action u, float64 `[num_actions, D]`.
      covariance: S, float64 `[D, D]`.
      shape: (height, width, channels) of a frame, D values in all.
    """

    transition: np.ndarray
    pushes: np.ndarray
    covariance: np.ndarray
    shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        """D, the values of a frame."""
        return len(self.transition)

    def conditional(self, frame: int, action: int) -> Conditional:
        """The law of a frame given all frames before it, equation (1)."""
        identity = jnp.eye(self.size)
        if frame == 0:
            return Conditional(identity[:, :0], jnp.zeros(self.size), identity)
        older = jnp.zeros((self.size, (frame - 1) * self.size))
        of_history = jnp.concatenate([older, self.transition], 1)
        return Conditional(of_history, jnp.asarray(self.pushes)[action], self.covariance)

    def law(self, actions: Sequence[int]) -> Gaussian:
        """The law of a whole clip with these actions, F * D values."""
        return chain([self.conditional(i, action) for i, action in enumerate(actions)])

    def affine(self, sigma: float, frame: int, action: int) -> Affine:
        """Equation (3) to level 0, given all frames before: the map that a student is to learn."""
        of_history, constant, covariance = self.conditional(frame, action)
        flow_of = Gaussian(jnp.zeros(self.size), covariance).flow
        of_x = flow_of(jnp.eye(self.size), jnp.full(self.size, sigma)).T
        of_mean = jnp.eye(self.size) - (1 - sigma) * of_x
        return Affine(of_x, of_mean @ of_history, of_mean @ constant)

    def sample(self, rng: jax.Array, actions: jax.Array) -> jax.Array:
        """Draws clips `[B, F, height, width, channels]` for actions `[B, F]`."""
        batch, frames = actions.shape
        noise = jax.random.normal(rng, (frames, batch, self.size), jnp.result_type(float))
        moves = jnp.asarray(self.pushes)[actions.T] + noise @ np.linalg.cholesky(self.covariance).T
        x = self._iterate(noise[0], moves[1:])
        return x.swapaxes(0, 1).reshape(batch, frames, *self.shape)

    def teacher_forced(self, clean: jax.Array, condition: Condition) -> flow.Velocity:
        """The exact stage-1 teacher: noisy frames given the clean frames before them.

        Args:
          clean: `[B, F, H, W, C]`.
          condition: `actions`, int `[B, F]`.

        Returns:
          A velocity field over x `[B, draws * F, H, W, C]`, sigma `[B, draws * F]`.
        """
        return self._framewise(self._next_frames(clean, condition).velocity, clean.shape[1])

    def flow_map(self, clean: jax.Array, condition: Condition) -> Map:
        """The exact student: where the ODE of `teacher_forced` ends, `(x, sigma) -> x0`."""
        return self._framewise(self._next_frames(clean, condition).flow, clean.shape[1])

    def bidirectional(self, condition: Condition) -> flow.Velocity:
        """The exact stage-0 base: all frames at one noise level, `sigma[:, :1]`."""
        return self._clipwise(self._clips(condition).velocity)

    def bidirectional_flow_map(self, condition: Condition) -> Map:
        """Where the ODE of `bidirectional` ends, `(x, sigma) -> x0`."""
        return self._clipwise(self._clips(condition).flow)

    def _next_frames(self, clean, condition) -> Gaussian:
        """The laws of all frames given the ones before: means `[B, 1, F, D]`."""
        flat = clean.reshape(*clean.shape[:2], self.size)
        pushes = jnp.asarray(self.pushes)[condition["actions"]]
        later = flat[:, :-1] @ self.transition.T + pushes[:, 1:]
        mean = jnp.concatenate([jnp.zeros_like(flat[:, :1]), later], 1)
        first = (jnp.arange(clean.shape[1]) == 0)[:, None, None]
        covariance = jnp.where(first, jnp.eye(self.size), self.covariance)
        return Gaussian(mean[:, None], covariance)

    def _clips(self, condition) -> Gaussian:
        """The laws of whole clips: means `[B, F * D]`, one covariance."""
        batch, frames = condition["actions"].shape
        pushes = jnp.asarray(self.pushes)[condition["actions"].T]
        mean = self._iterate(jnp.zeros_like(pushes[0]), pushes[1:]).swapaxes(0, 1)
        covariance = self.law([0] * frames).covariance  # the same for all actions
        return Gaussian(mean.reshape(batch, -1), covariance)

    def _iterate(self, first: jax.Array, moves: jax.Array) -> jax.Array:
        """x^i = A x^{i-1} + moves^i from the first frame on, `[F, B, D]`."""

        def body(x, move):
            x = x @ self.transition.T + move
            return x, x

        return jnp.concatenate([first[None], jax.lax.scan(body, first, moves)[1]])

    def _framewise(self, fn: Map, frames: int) -> Map:
        """`fn` of x `[B, draws, F, D]`, sigma `[B, draws, F]`, as a field over latents."""

        def field(x, sigma):
            split = lambda y, *tail: y.reshape(len(x), -1, frames, *tail)
            return fn(split(x, self.size), split(sigma)).reshape(x.shape)

        return field

    def _clipwise(self, fn: Map) -> Map:
        """`fn` of x `[B, F * D]`, sigma `[B]`, as a field over latents."""
        return lambda x, sigma: fn(x.reshape(len(x), -1), sigma[:, 0]).reshape(x.shape)


def example(pixels: int = 2) -> World:
    """The world of `docs/proof.md`: frames of 1 x `pixels` pixels, 1 or 2, of 2 channels.

    A turns and couples the values and shrinks them by 0.8 or so; S has standard deviations from 0.2
    to 0.8 (0.2 and 0.6 for one pixel) along directions oblique to the axes. There are three
    actions: pushes along one direction, back and forth, and none.
    """
    turn = lambda angle: np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    coupling = np.array([[1.0, 0.3], [0.0, 0.9]])[:pixels, :pixels]
    axes = np.kron(turn(0.4) if pixels == 2 else np.eye(1), turn(0.9))
    deviations = np.array([0.2, 0.4, 0.6, 0.8])[:: 3 - pixels]
    push = np.array([0.6, -0.3, 0.0, 0.5])[: 2 * pixels]
    return World(
        0.8 * np.kron(coupling, turn(0.5)),
        np.outer([-1.0, 0.0, 1.0], push),
        (axes * np.square(deviations)) @ axes.T,
        (1, pixels, 2),
    )
