"""The one rule of who sees whom, against its statement in words."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpp.attention.pattern import CLEAN, Pattern, teacher_forced_entries


def words(pattern: Pattern, query, key) -> bool:
    """The rule once more, frame by frame and slowly."""
    (query_frame, query_copy), (key_frame, key_copy) = query, key
    first = pattern.first_chunk or pattern.chunk

    def chunk(frame):
        if pattern.chunk is None:
            return range(10**6)
        if frame < first:
            return range(first)
        start = first + (frame - first) // pattern.chunk * pattern.chunk
        return range(start, start + pattern.chunk)

    own = chunk(query_frame)
    if key_copy != CLEAN:
        return key_copy == query_copy and key_frame in own
    if key_frame >= own.stop or (key_frame in own and query_copy != CLEAN):
        return False
    if pattern.window is None or key_frame < pattern.sink:
        return True
    return key_frame >= own.stop - (pattern.window - pattern.sink)


@st.composite
def patterns(draw):
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    first_chunk = draw(st.none() | st.integers(1, 3))
    window = draw(st.none() | st.integers(max(chunk, first_chunk or 0) + sink, 9))
    return Pattern(chunk, first_chunk, window, sink if window else 0)


@given(patterns() | st.just(Pattern(chunk=None)), st.integers(1, 9), st.integers(1, 3))
def test_mask_is_the_rule(pattern, frames, draws):
    entries = teacher_forced_entries(frames, draws)
    expected = [
        [words(pattern, query, key) for key in zip(*entries, strict=True)]
        for query in zip(*entries, strict=True)
    ]
    np.testing.assert_array_equal(pattern.mask(entries, entries), expected)


def test_published_example_of_window_and_sink():
    """Window 3 with sink 1: frame 0 and the last two, the current one included."""
    frames = np.arange(6), np.zeros(6, int)
    mask = Pattern(window=3, sink=1).mask(frames, frames)
    assert [np.flatnonzero(row).tolist() for row in mask] == [
        [0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5],
    ]  # fmt: skip


def test_empty_slots_are_never_seen():
    query, slots = (np.array([0, -1]), np.array([1, 0])), (np.array([-1, -1]), np.zeros(2, int))
    assert not Pattern().mask(query, slots).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "at least 1 frame, got 0"),
        ({"first_chunk": 0}, "first chunk has at least 1 frame, got 0"),
        ({"sink": -1}, "sink has at least 0 frames, got -1"),
        ({"sink": 2}, "a sink of 2 frames needs a window to stay in"),
        ({"chunk": 3, "window": 2}, "window of 2 frames cannot hold a sink of 0 and a chunk of 3"),
        (
            {"first_chunk": 2, "window": 1},
            "window of 1 frames cannot hold a sink of 0 and a chunk of 2",
        ),
        ({"window": 2, "sink": 2}, "window of 2 frames cannot hold a sink of 2"),
        ({"chunk": None, "window": 4}, "bidirectional pattern has no window, got 4"),
        ({"chunk": None, "first_chunk": 2}, "bidirectional pattern has no first chunk, got 2"),
        ({"chunk": None, "sink": 3}, "bidirectional pattern has no sink, got 3"),
    ],
)
def test_patterns_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Pattern(**fields)


def test_chunks_after_given_frames():
    assert Pattern(chunk=3).after(1).chunk_index(7).tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert Pattern(chunk=3).after(6) == Pattern(chunk=3)
    assert Pattern(chunk=3, first_chunk=1).after(6) == Pattern(chunk=3)
    assert Pattern(chunk=3, first_chunk=3) == Pattern(chunk=3)
    assert Pattern(chunk=3, first_chunk=4).after(7) == Pattern(chunk=3, first_chunk=4)
    assert Pattern(chunk=3, first_chunk=4).after(0) == Pattern(chunk=3, first_chunk=4)
    assert Pattern(chunk=3, first_chunk=1).after(4) == Pattern(chunk=3, first_chunk=1)
    assert Pattern(chunk=3, window=6).after(5) == dataclasses.replace(
        Pattern(chunk=3, window=6), first_chunk=2
    )
