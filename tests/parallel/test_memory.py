import jax
import jax.numpy as jnp
import pytest

from cfpp.attention.pattern import Pattern
from cfpp.models.dit import REMAT
from cfpp.parallel import compiled
from cfpp.stages import dmd
from tests import tiny


def gradient(remat, attention="xla"):
    """The gradient of a teacher-forced loss, jitted, and parameters to take it at."""
    net = tiny.network(Pattern(), remat=remat, attention=attention)
    params, clean, noisy = tiny.params(net), tiny.latents(net, 3), tiny.latents(net, 3, seed=1)
    condition, sigma = {"actions": tiny.actions(3)}, jnp.full((2, 3), 0.5)

    @jax.jit
    @jax.grad
    def run(params):
        return jnp.mean(net.teacher_forced(params, clean, condition)(noisy, sigma) ** 2)

    return run, params


def test_rematerialised_gradients_are_equal():
    """The same operations in the same order: equal but for what XLA fuses otherwise."""
    kept, *others = (run(params) for run, params in map(gradient, REMAT))
    for other in others:
        jax.tree.map(tiny.close, other, kept)


def test_rematerialisation_saves_memory_whatever_is_unrolled():
    """Without a loop over the layers XLA would keep what is to be computed anew."""

    def temporaries(**options):
        net = tiny.network(Pattern(), layers=4, unroll=4, **options)
        params, x = tiny.params(net), tiny.latents(net, 6)
        condition, sigma = {"actions": tiny.actions(6)}, jnp.full((2, 6), 0.5)
        loss = lambda params: jnp.sum(net.teacher_forced(params, x, condition)(x, sigma) ** 2)
        compiled_gradient = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled_gradient.memory_analysis().temp_size_in_bytes

    assert temporaries(remat="full") < 0.7 * temporaries(remat="none")


@pytest.mark.parametrize("attention", ["xla", "pallas_tpu"])
def test_what_is_saved_is_not_computed_again(attention):
    def operations(remat):
        run, params = gradient(remat, attention)
        return compiled.flops(jax.make_jaxpr(run)(params).jaxpr)

    work = {remat: operations(remat) for remat in REMAT}
    assert work["none"] < work["save_attention"] < work["full"]
    assert work["offload"] == work["save_attention"]


def temporaries(chunk):
    """Bytes of stage 3's replayed gradient over a clip of 12 frames, its cache apart."""
    net = tiny.network(Pattern(chunk=chunk), remat="full", layers=4)
    x = tiny.latents(net, 12)
    condition, sigma = {"actions": tiny.actions(12)}, jnp.full(12, 0.5)
    cache = jax.eval_shape(lambda: net.dit.cache(2, 12).replace(frame=jnp.arange(12)))

    def loss(params, cache):
        return jnp.sum(dmd.replay(net, params, cache, x, sigma, condition) ** 2)

    compiled_gradient = jax.jit(jax.grad(loss)).lower(tiny.params(net), cache).compile()
    return compiled_gradient.memory_analysis().temp_size_in_bytes


def test_replay_takes_no_more_memory_for_more_chunks():
    """The same clip as 12 chunks and as 3: one parallel pass either way."""
    assert temporaries(1) <= 1.15 * temporaries(4)
