import jax
import jax.numpy as jnp
import pytest

from cfpp.attention.pattern import Pattern
from cfpp.models.dit import REMAT
from cfpp.parallel import compiled
from tests import tiny


def gradient(remat):
    """The gradient of a teacher-forced loss, and its operations."""
    net = tiny.network(Pattern(), remat=remat, attention="xla")
    params, clean, noisy = tiny.params(net), tiny.latents(net, 3), tiny.latents(net, 3, seed=1)
    condition, sigma = {"actions": tiny.actions(3)}, jnp.full((2, 3), 0.5)

    @jax.jit
    @jax.grad
    def run(params):
        return jnp.mean(net.teacher_forced(params, clean, condition)(noisy, sigma) ** 2)

    return run(params), compiled.flops(jax.make_jaxpr(run)(params).jaxpr)


@pytest.fixture(scope="module")
def kept():
    return gradient("none")


@pytest.mark.parametrize("remat", REMAT[1:])
def test_rematerialised_gradients_are_equal(remat, kept):
    """The same operations in the same order: equal but for what XLA fuses otherwise."""
    jax.tree.map(tiny.close, gradient(remat)[0], kept[0])


def test_what_is_saved_is_not_computed_again(kept):
    work = {remat: gradient(remat)[1] for remat in ("full", "save_attention", "offload")}
    assert kept[1] < work["save_attention"] < work["full"]
    assert work["offload"] == work["save_attention"]
