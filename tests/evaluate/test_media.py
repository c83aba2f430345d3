"""Videos and pictures written can be read back; faults of the user are told in one line."""

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from cfpp import media
from cfpp.errors import UserError


def read_mp4(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    information = next(reader)
    width, height = information["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return information, np.stack(frames)


def squares(frames, height=32, width=32):
    """A bright square that walks to the right."""
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for t in range(frames):
        video[t, 8:16, 2 * t : 2 * t + 8] = (220, 60, 60)
    return video


def test_mp4_holds_the_frames(tmp_path):
    video = squares(10)
    media.write_mp4(tmp_path / "x.mp4", video, frames_per_second=5, scale=4)
    information, frames = read_mp4(tmp_path / "x.mp4")
    assert information["fps"] == 5
    assert frames.shape == (10, 128, 128, 3)
    # One pixel from the middle of each 4x4 block; the codec is lossy and halves the colours.
    assert np.abs(frames[:, 2::4, 2::4].astype(int) - video).mean() < 3


def test_mp4_of_odd_size_repeats_nothing_but_the_padding(tmp_path):
    video = squares(3, height=31, width=33)
    media.write_mp4(tmp_path / "x.mp4", video)
    _, frames = read_mp4(tmp_path / "x.mp4")
    assert frames.shape == (3, 32, 34, 3)
    assert np.abs(frames[:, :31, :33].astype(int) - video).mean() < 5


def test_interrupted_stream_leaves_a_complete_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with media.Mp4Writer(tmp_path / "x.mp4") as writer:
            for t, frame in enumerate(squares(8)):
                if t == 5:
                    raise KeyboardInterrupt
                writer.append(frame)
    assert len(read_mp4(tmp_path / "x.mp4")[1]) == 5


def test_npy_holds_the_latents_however_many(tmp_path):
    latents = np.random.default_rng(0).standard_normal((12, 4, 6, 5)).astype(np.float16)
    for frames in (1, 12):
        with media.NpyWriter(tmp_path / "x.npy") as writer:
            for latent in latents[:frames]:
                writer.append(latent)
        found = np.load(tmp_path / "x.npy")
        np.testing.assert_array_equal(found, latents[:frames])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(media.read_floats(tmp_path / "x.npy", None, 4, 6, 5), found)
    with pytest.raises(KeyboardInterrupt):
        with media.NpyWriter(tmp_path / "x.npy") as writer:
            writer.append(latents[0])
            raise KeyboardInterrupt
    assert np.load(tmp_path / "x.npy").shape == (1, 4, 6, 5)


def test_npy_faults(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        media.NpyWriter(tmp_path / "nowhere" / "x.npy")
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        with media.NpyWriter("/dev/full") as writer:
            writer.append(np.zeros((64, 64, 64)))
    with media.NpyWriter(tmp_path / "x.npy") as writer:
        writer.append(np.zeros((2, 2, 1)))
        with pytest.raises(ValueError, match="the first latent was"):
            writer.append(np.zeros((2, 3, 1)))
    np.save(tmp_path / "x.npy", np.array([0, np.nan]))
    with pytest.raises(UserError, match=r"x\.npy has numbers that are not finite"):
        media.read_floats(tmp_path / "x.npy", 2)
    np.save(tmp_path / "x.npy", np.array([0, 1e300]))
    with pytest.raises(UserError, match=r"x\.npy has numbers that are not finite in float32"):
        media.read_floats(tmp_path / "x.npy", 2)
    whole = (tmp_path / "x.npy").read_bytes()
    for damage in (whole.replace(b"(2,)", b"((2,"), whole.replace(b"(2,)", b"(9**9,)"), whole[:40]):
        (tmp_path / "x.npy").write_bytes(damage)
        with pytest.raises(UserError, match=r"x\.npy cannot be read as an npy file"):
            media.read_floats(tmp_path / "x.npy", 2)


def test_mp4_faults(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        media.write_mp4(tmp_path / "nowhere" / "x.mp4", squares(1))
    with pytest.raises(UserError, match="is a directory"):
        media.write_mp4(tmp_path, squares(1))
    with pytest.raises(UserError, match=r"could not be written.*No space left"):
        media.write_mp4("/dev/full", squares(8))
    with pytest.raises(ValueError, match="uint8"):
        media.write_mp4(tmp_path / "x.mp4", squares(1).astype(np.float32))


def test_image_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    media.write_image(tmp_path / "x.png", image)
    np.testing.assert_array_equal(media.read_image(tmp_path / "x.png", 6, 9), image)


def test_image_faults(tmp_path):
    media.write_image(tmp_path / "x.png", np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(UserError, match="9 wide and 6 high, but the model wants 32 wide and 30"):
        media.read_image(tmp_path / "x.png", 30, 32)
    with pytest.raises(UserError, match=r"cannot be read.*No such file"):
        media.read_image(tmp_path / "missing.png", 6, 9)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="is not a picture"):
        media.read_image(tmp_path / "text.png", 6, 9)
    cut = (tmp_path / "x.png").read_bytes()[:-30]
    (tmp_path / "cut.png").write_bytes(cut)
    with pytest.raises(UserError, match="picture"):
        media.read_image(tmp_path / "cut.png", 6, 9)
    with pytest.raises(UserError, match="cannot be read"):
        media.read_image(tmp_path, 6, 9)


def test_kinds_of_pictures(tmp_path, monkeypatch):
    """A picture is read as it looks, or not at all."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    image, turned = Image.fromarray(colours), Image.Exif()
    turned[0x0112] = 3  # taken upside down
    image.save(tmp_path / "turned.png", exif=turned)
    np.testing.assert_array_equal(
        media.read_image(tmp_path / "turned.png", 6, 9), colours[::-1, ::-1]
    )
    image.putalpha(255)
    image.save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "opaque.png", 6, 9), colours)
    image.putalpha(254)
    image.save(tmp_path / "clear.png")
    with pytest.raises(UserError, match="is transparent in places; give it a background"):
        media.read_image(tmp_path / "clear.png", 6, 9)
    Image.fromarray(np.full((6, 9), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits a colour"):
        media.read_image(tmp_path / "deep.png", 6, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # of which 6 x 9 are more, if not twice
    with pytest.raises(UserError, match=r"opaque\.png cannot be read as a picture \(.*54 pixels"):
        media.read_image(tmp_path / "opaque.png", 6, 9)


def test_tile_places_every_video():
    videos = np.arange(5, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (1, 2, 3, 4, 3), np.uint8
    )
    tiled = media.tile(videos, columns=3, gap=2)
    assert tiled.shape == (2, 3 + 2 + 3, 4 + 2 + 4 + 2 + 4, 3)
    assert (tiled[:, :3, 6:10] == 1).all()
    assert (tiled[:, 5:, :4] == 3).all()
    assert (tiled[:, 5:, 12:] == 0).all()


def test_film_strips_show_the_frames():
    video = squares(4)
    sheet = media.film_strips(
        [media.Strip("first", "note", video), media.Strip("second", "", video[:3])],
        columns=["0", "1\nup", "2\n←", "3"],
        scale=2,
        corner="frame",
        given=1,
    )
    red = (sheet == (220, 60, 60)).all(-1)
    assert red.sum() == 7 * 64 * 4
