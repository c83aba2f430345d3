"""Pictures and videos in and out: mp4 and png files, npy files of latents, tiles, film strips.

Videos are uint8 `[frames, height, width, 3]`, images uint8 `[height, width, 3]`, RGB.
"""

import contextlib
import functools
import io
import os
import pathlib
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from cfpp import paths
from cfpp.errors import UserError, one_line

PAPER = (255, 255, 255)
INK = (24, 28, 36)
FADED_INK = (106, 114, 128)
RULE = (214, 218, 226)
_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)  # of too many pixels


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """Repeats every pixel `scale` times along height and width; `[..., H, W, 3]`, any dtype."""
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return video.repeat(scale, axis=-3).repeat(scale, axis=-2)


class Mp4Writer:
    """Writes one frame after another to an H.264 mp4 file, in constant memory.

        with Mp4Writer("play.mp4", frames_per_second=8, scale=4) as writer:
            for frame in frames:          # uint8 [H, W, 3], all of one size
                writer.append(frame)

    The encoder is the ffmpeg program that `imageio-ffmpeg` carries. It is started with the first
    frame, in a session of its own, so that Ctrl-C reaches Python alone and the file is closed
    properly. (`imageio_ffmpeg.write_frames` is not used: it forks with a Python hook, which is
    unsafe once JAX has started its threads, and it does not report that the encoder failed.)

    Args:
      path: the file to write; an existing one is replaced. To a bucket it is copied when it is
        complete.
      frames_per_second: playing speed.
      scale: every pixel becomes a square of `scale x scale` pixels.

    Raises:
      UserError: the file cannot be written, or the encoder fails (say, on a full disk).
    """

    def __init__(self, path: epath.PathLike, frames_per_second: float = 8, scale: int = 1):
        self._path = paths.known(path)
        self._frames_per_second = frames_per_second
        self._scale = scale
        self._shape: tuple[int, ...] | None = None
        self._process: subprocess.Popen | None = None
        self._log = None
        paths.check_file(self._path)

    def append(self, frame: np.ndarray) -> None:
        """Adds one frame, uint8 `[H, W, 3]`."""
        frame = np.asarray(frame)
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame is uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        if self._shape is None:
            self._shape = frame.shape
            self._start(frame.shape[0] * self._scale, frame.shape[1] * self._scale)
        if frame.shape != self._shape:
            raise ValueError(f"the first frame was {self._shape}, this one is {frame.shape}")
        try:
            self._process.stdin.write(np.ascontiguousarray(enlarge(frame, self._scale)).data)
        except OSError as error:
            self._finish()
            raise UserError(f"{self._path}: the video could not be written ({error})") from error

    def close(self) -> None:
        """Completes the file."""
        if self._process is not None:
            self._finish()

    def _start(self, height: int, width: int) -> None:
        import imageio_ffmpeg

        self._log = tempfile.TemporaryFile()
        local = os.path.abspath(self._path)
        if paths.is_remote(self._path):
            self._folder = tempfile.TemporaryDirectory()
            local = os.path.join(self._folder.name, "video.mp4")
        # H.264 in the form that every player knows (4:2:0) wants even sizes: repeat the edge.
        even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"
        command = (
            f"-y -v error -f rawvideo -pix_fmt rgb24 -s {width}x{height}"
            f" -r {self._frames_per_second} -i - -an -vf {even} -vcodec libx264"
            " -preset fast -crf 16 -pix_fmt yuv420p -threads 1 -movflags +faststart -f mp4"
        )
        self._process = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), *command.split(), local],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )

    def _finish(self) -> None:
        process, self._process = self._process, None
        try:
            process.stdin.close()
        except OSError:
            pass  # The encoder has gone; its exit code says why.
        code = process.wait()
        self._log.seek(0)
        message = self._log.read().decode(errors="replace").strip().split("\n")[0]
        self._log.close()
        if code != 0:
            raise UserError(f"{self._path}: the video could not be written ({message})")
        if paths.is_remote(self._path):
            with self._folder as folder:
                self._path.write_bytes(pathlib.Path(folder, "video.mp4").read_bytes())

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def write_mp4(
    path: epath.PathLike, video: np.ndarray, frames_per_second: float = 8, scale: int = 1
) -> None:
    """Writes a video, uint8 `[T, H, W, 3]`; see `Mp4Writer`."""
    with Mp4Writer(path, frames_per_second, scale) as writer:
        for frame in video:
            writer.append(frame)


class NpyWriter:
    """Writes one latent after another to an npy file, float32 `[T, H, W, C]`, in constant memory.

        with NpyWriter("play.npy") as writer:
            for latent in latents:        # floats [H, W, C], all of one size
                writer.append(latent)

    The head says how many there are, so it is written once more at the end; NumPy leaves room for
    any number there.

    Args:
      path: the file to write; an existing one is replaced. To a bucket it is copied when it is
        complete.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, path: epath.PathLike):
        self._path = paths.known(path)
        self._file = None
        self._frames, self._shape = 0, None
        paths.check_file(self._path)

    def append(self, latent: np.ndarray) -> None:
        """Adds one latent, floats `[H, W, C]`."""
        latent = np.ascontiguousarray(latent, np.float32)
        if self._shape not in (None, latent.shape):
            raise ValueError(f"the first latent was {self._shape}, this one is {latent.shape}")
        with self._faults():
            if self._file is None:
                is_remote = paths.is_remote(self._path)
                self._file = tempfile.TemporaryFile() if is_remote else open(self._path, "wb")
                self._shape = latent.shape
                self._write_head()
            self._file.write(latent.data)
        self._frames += 1

    def close(self) -> None:
        """Completes the file."""
        if self._file is None:
            return
        with self._faults(), contextlib.closing(self._file):
            self._write_head()
            if paths.is_remote(self._path):
                self._file.seek(0)
                self._path.write_bytes(self._file.read())

    def _write_head(self) -> None:
        descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
        shape = (self._frames, *self._shape)
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": descr, "fortran_order": False, "shape": shape}
        )

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path}: the latents could not be written ({error})") from error

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_floats(path: epath.PathLike, *shape: int | None) -> np.ndarray:
    """Reads an npy file of floats.

    Args:
      path: the file.
      shape: its sizes; None is any.

    Returns:
      float32 of that shape.

    Raises:
      UserError: no such file, none of floats, of another shape, or with numbers that are not
        finite.
    """
    try:
        with epath.Path(path).open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a damaged head is read as Python: whatever that may raise
        raise UserError(f"{path} cannot be read as an npy file ({one_line(error)})") from error
    fits = len(array.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )
    if not fits or not np.issubdtype(array.dtype, np.floating):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(
            f"{path} is {array.dtype} {list(array.shape)}, but the model wants floats [{sizes}]"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} has numbers that are not finite in float32")
    return array


def read_image(path: epath.PathLike, height: int, width: int) -> np.ndarray:
    """Reads a picture of a given size, as RGB.

    Returns:
      uint8 `[height, width, 3]`.

    Raises:
      UserError: no such file, not a picture, or one of another size or kind: transparent, or of
        more than 8 bits a colour.
    """
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            image = ImageOps.exif_transpose(image)  # as its camera was held
            kind, alpha = image.mode, image.convert("RGBA").getchannel("A")
            pixels = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture (a PNG or JPEG file was expected)") from error
    except (OSError, ValueError, SyntaxError, *_BOMBS) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error
    if kind.startswith(("I", "F")):
        raise UserError(f"{path} has more than 8 bits a colour; convert it to 8")
    if alpha.getextrema()[0] < 255:
        raise UserError(f"{path} is transparent in places; give it a background")
    if pixels.shape[:2] != (height, width):
        raise UserError(
            f"{path} is {pixels.shape[1]} wide and {pixels.shape[0]} high, "
            f"but the model wants {width} wide and {height} high"
        )
    return pixels


def write_image(path: epath.PathLike, image: np.ndarray) -> None:
    """Writes a picture, uint8 `[H, W, 3]`, as PNG."""
    path = epath.Path(path)
    paths.check_file(path)
    try:
        encoded = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(encoded, "PNG")
        path.write_bytes(encoded.getvalue())
    except OSError as error:
        raise UserError(f"{path}: the picture could not be written ({error})") from error


def tile(videos: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Lays several videos out on a grid, row by row.

    Args:
      videos: uint8 `[N, T, H, W, 3]`.
      columns: videos in a row; the last row may be left with black places.
      gap: black pixels between neighbours.

    Returns:
      uint8 `[T, rows * (H + gap) - gap, columns * (W + gap) - gap, 3]`.
    """
    count, frames, height, width, _ = videos.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.zeros((frames, rows, height + gap, columns, width + gap, 3), np.uint8)
    for index, video in enumerate(videos):
        grid[:, index // columns, :height, index % columns, :width] = video
    grid = grid.reshape(frames, rows * (height + gap), columns * (width + gap), 3)
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


class Strip(NamedTuple):
    """One row of a film-strip sheet.

    Attributes:
      title: what the row shows.
      note: a smaller second line.
      video: uint8 `[T, H, W, 3]`.
      apart: whether a wider gap sets the row apart from the one above.
    """

    title: str
    note: str
    video: np.ndarray
    apart: bool = False


def film_strips(
    strips: Sequence[Strip],
    columns: Sequence[str],
    scale: int = 2,
    corner: str = "",
    given: int = 0,
) -> np.ndarray:
    """Draws videos under one another, each as a row of frames, with labels.

    Args:
      strips: the rows; every video has the same frame size, and at most `len(columns)` frames.
      columns: what stands over each frame; a line break starts a second, fainter line.
      scale: size of a video pixel in the picture.
      corner: what stands over the row titles; line breaks as in `columns`.
      given: so many frames at the left were given, not generated: a gap sets them apart.

    Returns:
      uint8 `[height, width, 3]`: the picture, on white.
    """
    _, height, width, _ = strips[0].video.shape
    cell_height, cell_width = height * scale, width * scale
    gap, row_gap, margin, set_apart = 4, 10, 20, 14
    title_font, note_font = font(17, bold=True), font(14)
    head_height = 48

    left = (
        margin
        + 18
        + max(
            *(int(title_font.getlength(strip.title)) for strip in strips),
            *(int(note_font.getlength(strip.note)) for strip in strips),
            *(int(title_font.getlength(line)) for line in corner.split("\n")),
        )
    )

    def column_x(column: int) -> int:
        return left + column * (cell_width + gap) + (set_apart if column >= given > 0 else 0)

    steps = [cell_height + row_gap + 14 * strip.apart for strip in strips[1:]]
    row_y = [margin + head_height, *(margin + head_height + np.cumsum(steps, dtype=int)).tolist()]
    total_width = column_x(len(columns)) - gap + margin
    total_height = row_y[-1] + cell_height + margin
    sheet = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(sheet)

    def heading(x: int, text: str, anchor: str) -> None:
        first, _, second = text.partition("\n")
        draw.text((x, margin + 8), first, INK, title_font, anchor=anchor)
        draw.text((x, margin + 30), second, FADED_INK, font(17), anchor=anchor)

    heading(margin, corner, "lm")
    for column, text in enumerate(columns):
        heading(column_x(column) + cell_width // 2, text, "mm")
    for row, strip in enumerate(strips):
        middle = row_y[row] + cell_height // 2
        draw.text((margin, middle - 11), strip.title, INK, title_font, anchor="lm")
        draw.text((margin, middle + 11), strip.note, FADED_INK, note_font, anchor="lm")
        for column, frame in enumerate(strip.video):
            picture = Image.fromarray(enlarge(frame, scale))
            sheet.paste(picture, (column_x(column), row_y[row]))
    if given > 0:
        x = column_x(given) - (gap + set_apart) // 2 - 1
        draw.line((x, margin + head_height, x, total_height - margin), RULE, 2)
    return np.asarray(sheet)


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries and which has arrows, at `size` pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
