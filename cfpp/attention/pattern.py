"""Which frames attend to which: one small value that every mask in cfpp comes from.

A sequence is a list of *entries*, each one frame's tokens. An entry has a frame number and a copy:
copy 0 is the clean frame, copies 1, 2, ... are noisy draws of it. Frames are grouped in chunks, the
unit that is generated at once. The whole rule, for chunks c(.) of a query and a key:

    clean key:  c(key) <= c(query) if the query is clean, c(key) < c(query) if it is noisy,
                and the key lies within the window or the sink of the query's chunk;
    noisy key:  same copy and same chunk as the query.

Every layout follows from the entries alone. Noisy copies only, one chunk: bidirectional. Clean
entries and then noisy ones: teacher forcing. Cache slots as keys, one chunk as queries: decoding.
"""

import dataclasses

import numpy as np

CLEAN = 0  # the copy number of clean entries


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Attention between frames.

    Attributes:
      chunk: frames in a chunk; None makes the whole clip one chunk (bidirectional).
      first_chunk: frames in the first chunk where that differs, e.g. the given frames of
        image-to-video; None where it does not, and what `chunk` becomes.
      window: the most frames that a query may attend to, its own chunk and the sink included;
        None is all.
      sink: the first frames of the clip, which stay visible when the window has moved on.

    Raises:
      ValueError: a size is out of range, the window cannot hold the sink and a chunk, or a
        bidirectional pattern has sizes besides.
    """

    chunk: int | None = 1
    first_chunk: int | None = None
    window: int | None = None
    sink: int = 0

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"a chunk has at least 1 frame, got {self.chunk}")
        if self.first_chunk is not None and self.first_chunk < 1:
            raise ValueError(f"the first chunk has at least 1 frame, got {self.first_chunk}")
        if self.sink < 0:
            raise ValueError(f"a sink has at least 0 frames, got {self.sink}")
        if self.chunk is None:
            fields = {
                "first chunk": self.first_chunk, "window": self.window, "sink": self.sink or None,
            }  # fmt: skip
            for name, size in fields.items():
                if size is not None:
                    raise ValueError(f"a bidirectional pattern has no {name}, got {size}")
        elif self.first_chunk == self.chunk:  # one pattern, one value
            object.__setattr__(self, "first_chunk", None)
        if self.window is None:
            if self.sink:
                raise ValueError(f"a sink of {self.sink} frames needs a window to stay in")
            return
        largest = max(self.chunk, self.first_chunk or 0)
        if self.window < self.sink + largest:
            raise ValueError(
                f"a window of {self.window} frames cannot hold a sink of {self.sink} "
                f"and a chunk of {largest}"
            )

    def chunk_end(self, frame):
        """The first frame after the chunk that holds `frame` (an int or an integer array)."""
        if self.chunk is None:
            return frame * 0 + 2**30
        first = self.chunk if self.first_chunk is None else self.first_chunk
        later = first + ((frame - first) // self.chunk + 1) * self.chunk
        return first + (later - first) * (frame >= first)

    def chunk_index(self, frames: int) -> np.ndarray:
        """The chunk that each of the frames 0 .. frames - 1 belongs to, int `[frames]`."""
        return np.unique(self.chunk_end(np.arange(frames)), return_inverse=True)[1]

    def after(self, context: int) -> "Pattern":
        """The pattern for what follows the first `context` frames of a clip.

        Where a chunk begins there, the chunks are this pattern's own; else they start anew there.
        """
        if self.chunk is None or not context or self.chunk_end(context - 1) == context:
            return self
        return dataclasses.replace(self, first_chunk=context % self.chunk or None)

    def visible(self, query_frame, query_copy, key_frame, key_copy):
        """Whether a query entry attends to a key entry.

        Args:
          query_frame, query_copy, key_frame, key_copy: integer arrays (NumPy, or JAX where frame
            numbers are known only at run time) that broadcast against one another. Negative
            frames are empty cache slots: they are never seen.

        Returns:
          A bool array of the broadcast shape.
        """
        query_end, key_end = self.chunk_end(query_frame), self.chunk_end(key_frame)
        same_chunk = query_end == key_end
        history = (key_end < query_end) | (same_chunk & (query_copy == CLEAN))
        if self.window is not None:
            recent = key_frame >= query_end - (self.window - self.sink)
            history &= recent | (key_frame < self.sink)
        own = same_chunk & (query_copy == key_copy)
        return (key_frame >= 0) & (((key_copy == CLEAN) & history) | own)

    def mask(self, query, key):
        """The `[queries, keys]` table of `visible` for entries given as (frames, copies) pairs."""
        return self.visible(query[0][:, None], query[1][:, None], key[0][None], key[1][None])


def teacher_forced_entries(frames: int, draws: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers and copies of `[clean frames | draws x noisy frames]`, each int `[entries]`."""
    frame = np.tile(np.arange(frames), 1 + draws)
    copy = np.repeat(np.arange(1 + draws), frames)
    return frame, copy
