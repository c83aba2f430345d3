"""The TPU kernels' numbers, in Pallas's interpreter; `test_tpu_compile` compiles them for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from cfpp.attention import pallas_tpu
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from tests.attention import compare

attend = functools.partial(pallas_tpu.attend, interpret=True)


def blocks_of(
    monkeypatch, smallest: int, largest: int, forward=(128, 256), backward=(512, 1664), lanes=128
):
    monkeypatch.setattr(pallas_tpu, "SMALLEST_PART", smallest)
    monkeypatch.setattr(pallas_tpu, "LARGEST_BLOCK", largest)
    monkeypatch.setattr(pallas_tpu, "LANES", lanes)
    monkeypatch.setattr(pallas_tpu, "FORWARD_PART", forward)
    monkeypatch.setattr(pallas_tpu, "BACKWARD_PART", backward)


@pytest.mark.parametrize(
    ("frames", "tokens", "group", "split"),
    [
        (42, 1560, 1, 1),  # Wan at 480p: a frame is a block
        (21, 3600, 1, 3),  # and at 720p: a third of a frame
        (32, 256, 4, 1),  # 6 frames would fit, but do not divide 32
        (7, 64, 7, 1),
        (62, 1, 31, 1),
        (37, 1, 1, 1),
    ],
)
def test_blocks_cut_frames_evenly(frames, tokens, group, split):
    blocks = pallas_tpu.Cut.choose(frames, tokens, pallas_tpu.LARGEST_BLOCK)
    assert blocks == (group, split, group * tokens // split, 0)


@given(st.integers(pallas_tpu.LARGEST_BLOCK + 1, 20_000))
def test_any_large_frame_is_cut_into_few_blocks(tokens):
    _, split, rows, tail = pallas_tpu.Cut.choose(7, tokens, pallas_tpu.LARGEST_BLOCK)
    assert (split - 1) * rows + (tail or rows) == tokens
    assert pallas_tpu.SMALLEST_PART <= rows <= pallas_tpu.LARGEST_BLOCK
    assert not tail or (0 < tail < rows and rows % pallas_tpu.LANES == 0)
    assert not tail or split <= -(-tokens // pallas_tpu.LARGEST_BLOCK)


def test_a_cache_is_cut_where_that_moves_no_data():
    assert pallas_tpu.Cut.choose(20, 16, 1000, in_place=True).group == 20
    assert pallas_tpu.Cut.choose(20, 18, 1000, in_place=True).group == 1


@settings(deadline=None)
@given(compare.masks(), st.sampled_from([(4, 20), (9, 10), (40, 40), (2, 4)]), st.booleans())
def test_pairs_spell_out_the_mask(mask, tokens_largest, by_key):
    """Every visible pair of tokens is met once, no pair of blocks without one, none left out."""
    tokens, largest = tokens_largest
    with pytest.MonkeyPatch.context() as patch:
        blocks_of(patch, 1, largest)
        query, key = (pallas_tpu.Cut.choose(frames, tokens, largest) for frames in mask.shape)
    outer, inner, kind, bits, length = pallas_tpu.pairs(mask, query, key, by_key)
    assert len(outer) == length
    seen = mask.repeat(tokens, 0).repeat(tokens, 1)
    found = np.zeros_like(seen)
    for visit in range(length):
        i, j = (inner, outer)[not by_key][visit], (outer, inner)[not by_key][visit]
        rows, columns = slice(i * query.rows, (i + 1) * query.rows), slice(j * key.rows, None)
        frames = bits[visit * query.group : (visit + 1) * query.group, None]
        block = frames >> np.arange(key.group) & 1 == 1
        block = block.repeat(query.rows // query.group, 0).repeat(key.rows // key.group, 1)
        assert kind[visit] == block.any().astype(int) + block.all()
        assert kind[visit] or not seen[rows].any() or by_key
        found[rows, columns][:, : key.rows] |= block
    np.testing.assert_array_equal(found, seen)
    assert (np.diff(outer) >= 0).all()  # an output block is written in one run of pairs
    assert set(outer) == set(range(max(outer) + 1))


def test_pairs_of_a_mask_known_at_run_time():
    mask = np.random.default_rng(0).random((6, 4)) < 0.4
    query, key = pallas_tpu.Cut(2, 1, 8), pallas_tpu.Cut(1, 1, 4)
    for by_key in (False, True):
        expected = pallas_tpu.pairs(mask, query, key, by_key)
        found = jax.jit(lambda m, b=by_key: pallas_tpu.pairs(m, query, key, b))(mask)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.reshape(-1)[: theirs.size], theirs.reshape(-1))


@settings(max_examples=6, deadline=None)
@given(
    compare.masks(),
    st.sampled_from([1, 3, 8, 24, 40]),
    st.sampled_from([24, 32, 64, 128]),
    st.sampled_from([{}, {"smallest": 4, "largest": 24, "forward": (8, 16), "backward": (16, 8)}]),
    st.booleans(),
)
def test_any_mask(mask, tokens, head_dim, sizes, traced):
    """Frames grouped and cut, scores in one part and in many, masks static and not."""
    with pytest.MonkeyPatch.context() as patch:
        if sizes:
            blocks_of(patch, **sizes)
        compare.check(attend, mask, tokens, head_dim, traced=traced)


@settings(max_examples=4, deadline=None)
@given(compare.masks(), st.integers(13, 47), st.booleans())
def test_frames_that_blocks_do_not_fill(mask, tokens, traced):
    """Blocks of 8 or more tokens, of which the last reaches past the frame's end into NaN."""
    with pytest.MonkeyPatch.context() as patch:
        blocks_of(patch, smallest=48, largest=24, forward=(8, 16), backward=(16, 8), lanes=8)
        compare.check(attend, mask, tokens, 24, traced=traced)


@pytest.mark.parametrize(("tokens", "traced"), [(24, True), (40, False)])
def test_bfloat16(monkeypatch, tokens, traced):
    """Within twice the rounding error of the reference; five frames a block, and one."""
    blocks_of(monkeypatch, 8, 120, forward=(64, 64))
    compare.check(attend, np.tri(5, dtype=bool), tokens, 32, "bfloat16", traced)


def test_memory_as_on_a_tpu():
    """Nothing is read that was not written: the emulator of a TPU's memory starts it with NaN."""
    emulated = functools.partial(pallas_tpu.attend, interpret=pltpu.InterpretParams())
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    compare.check(emulated, mask, 8, 24)


def test_a_layer_of_many_is_read_in_place():
    compare.check_layer(attend, 24)


def test_what_cannot_be():
    x = jnp.zeros((1, 1, 1, 4, 8), jnp.float16)
    with pytest.raises(ValueError, match="got float16, float16 and float16"):
        attend(x, x, x, np.ones((1, 1), bool))
    entries = teacher_forced_entries(100)
    x = jax.ShapeDtypeStruct((1, 1, 200, 3600, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"lists of \d+ numbers, and .* has room for 261120"):
        jax.eval_shape(lambda q, k, v: attend(q, k, v, Pattern().mask(entries, entries)), x, x, x)
