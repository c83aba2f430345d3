"""The libraries' attention in cfpp's interface, on a CPU."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp.attention import library
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from cfpp.errors import UserError
from tests.attention import compare

entries = teacher_forced_entries(3)
TEACHER_FORCED = Pattern(window=2).mask(entries, entries)
cudnn = functools.partial(library.cudnn, implementation="xla")
splash = functools.partial(library.splash, interpret=True)


@pytest.mark.parametrize("mask", [TEACHER_FORCED, np.eye(3, 4, dtype=bool)[[0, 2, 1, 0]]])
def test_dense_calls_by_frames(mask):
    compare.check(cudnn, mask, 5, 8)


def test_a_frame_that_sees_nothing_gets_zeros():
    mask = np.array([[True, False], [False, False]])
    (q, k, v), _ = compare.inputs(mask, 3, 8)
    assert not np.any(cudnn(q, k, v, mask)[0][:, :, 1])


def test_tokamax():
    pytest.importorskip("tokamax")
    tokamax = functools.partial(library.tokamax, implementation="xla")
    compare.check(tokamax, TEACHER_FORCED, 5, 8)


def test_tokamax_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    (q, k, v), _ = compare.inputs(TEACHER_FORCED, 3, 8)
    with pytest.raises(UserError, match=r"; pip install -c constraints.txt -e '\.\[tokamax\]' in"):
        library.tokamax(q, k, v, TEACHER_FORCED)


def test_tokamax_does_not_go_with_this_jax(monkeypatch, tmp_path):
    """One line with both versions, whatever the package stumbles over when it is imported."""
    (tmp_path / "tokamax.py").write_text("import jax\njax.experimental.nowhere.Nothing")
    (tmp_path / "tokamax-9.8.dist-info").mkdir()
    (tmp_path / "tokamax-9.8.dist-info" / "METADATA").write_text("Name: tokamax\nVersion: 9.8\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tokamax", raising=False)
    (q, k, v), _ = compare.inputs(TEACHER_FORCED, 3, 8)
    message = rf"tokamax 9\.8 cannot be imported beside JAX {jax.__version__} \(.*'nowhere'"
    with pytest.raises(UserError, match=message) as error:
        library.tokamax(q, k, v, TEACHER_FORCED)
    assert "\n" not in str(error.value)


def test_splash():
    compare.check(splash, TEACHER_FORCED, 33, 24)


@pytest.mark.parametrize("frames", [3, 7])
def test_splash_mask_is_the_mask(frames):
    pair = teacher_forced_entries(frames)
    mask, tokens = Pattern(window=3).mask(pair, pair), 90
    rows = 2 * frames * tokens
    ours = library.FrameMask(mask, tokens, rows + 20, rows + 50)
    expected = np.pad(mask.repeat(tokens, 0).repeat(tokens, 1), ((0, 0), (0, 50)))
    np.testing.assert_array_equal(ours[:rows, :], expected)
    for block in np.ndindex(rows // 64, rows // 64):
        index = tuple(slice(64 * i, 64 * i + 64) for i in block)
        np.testing.assert_array_equal(ours[index], expected[index])


def test_masks_that_splash_cannot_express():
    with pytest.raises(ValueError, match="at most 2 runs of 40 key frames, got 20"):
        library.FrameMask(np.arange(40)[None] % 2 == 0, 4, 128, 256)
    with pytest.raises(ValueError, match="every frame to see some key"):
        library.FrameMask(np.array([[True], [False]]), 4, 128, 128)


@pytest.mark.parametrize("attend", [library.splash, library.cudnn, library.tokamax])
def test_no_library_attends_to_a_cache(attend):
    (q, k, v), _ = compare.inputs(TEACHER_FORCED, 3, 8)
    with pytest.raises(ValueError, match=f"{attend.__name__} cannot attend to a cache"):
        attend(q, k, v, jnp.asarray(TEACHER_FORCED))
    with pytest.raises(ValueError, match=f"{attend.__name__} cannot attend to a cache"):
        attend(q, k[None], v[None], TEACHER_FORCED, layer=0)


def test_what_cudnn_cannot_take():
    (q, k, v), _ = compare.inputs(TEACHER_FORCED, 3, 8)
    with pytest.raises(ValueError, match="bfloat16 or float16, got float32"):
        library.cudnn(q, k, v, TEACHER_FORCED)
    (q, k, v), _ = compare.inputs(TEACHER_FORCED, 3, 12, "bfloat16")
    with pytest.raises(ValueError, match="multiple of 8 up to 128, got 12"):
        library.cudnn(q, k, v, TEACHER_FORCED)
