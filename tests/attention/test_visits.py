"""The blocks that the GPU kernels visit, against the mask of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp.attention.visits import visits
from tests.attention import compare


@settings(deadline=None)
@given(compare.masks(), st.integers(1, 70), st.sampled_from([1, 7, 16]), st.sampled_from([8, 24]))
def test_visits_are_what_the_tokens_see(mask, tokens, rows, columns):
    table = visits(mask, tokens, rows, columns)
    seen = mask.repeat(tokens, 0).repeat(tokens, 1)
    for i, block in enumerate(table.index):
        row = seen[i * rows : (i + 1) * rows]
        parts = [row[:, j * columns : (j + 1) * columns] for j in block]
        assert sorted(block) == list(range(len(block)))
        whole, partly = table.whole[i], table.seen[i]
        assert all(part.all() and part.shape[1] == columns for part in parts[:whole])
        assert all(part.any() for part in parts[:partly])
        assert not any(part.any() for part in parts[partly:])
    for j in range(len(table.index[0])):
        first = j * columns // tokens
        last = (min((j + 1) * columns, seen.shape[1]) - 1) // tokens
        bits = mask[:, first : last + 1] << np.arange(last + 1 - first)
        np.testing.assert_array_equal(table.bits[:, j], bits.sum(1))


def test_visits_of_a_mask_known_at_run_time():
    mask = np.random.default_rng(0).random((6, 5)) < 0.5
    expected = visits(mask, 20, 64, 32)
    jax.tree.map(np.testing.assert_array_equal, visits(jnp.asarray(mask), 20, 64, 32), expected)
