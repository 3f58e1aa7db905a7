"""Folders of pictures: layouts, kinds of pictures, sizes, and damage."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from evenkeel.errors import ConfigError, FormatError
from evenkeel.study.data import Dataset, folder, load


def _save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def _gray(value: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def _colour(red: int, green: int, blue: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width, 3), (red, green, blue), np.uint8)


def _classes(root: Path, count: int = 4) -> Path:
    """Two classes of gray pictures; the value of a picture tells class and place."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(count):
            _save(root / name / f"{i}.png", _gray(100 * label + i))
    return root


def test_a_split_of_its_own(tmp_path: Path) -> None:
    _classes(tmp_path / "train", 6)
    _classes(tmp_path / "test", 2)
    data = load("folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.shape == (1, 4, 4)
    assert data.test.images[:, 0, 0, 0].tolist() == [0, 1, 100, 101]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.train.images[:, 0, 0, 0].long() // 100, data.train.labels)
    assert sorted(data.train.images[:, 0, 0, 0].tolist()) == [*range(6), *range(100, 106)]
    assert data.train.labels.tolist() != sorted(data.train.labels.tolist())
    assert data.notes == ()


def test_our_split_is_fixed_and_fair(tmp_path: Path) -> None:
    _classes(tmp_path, 8)
    data = load("folder", tmp_path)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert len(data.train) == 12
    both = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0].tolist()
    assert sorted(both) == [*range(8), *range(100, 108)]
    assert load("folder", tmp_path).fingerprint == data.fingerprint


def test_gray_only_if_all_are(tmp_path: Path) -> None:
    _classes(tmp_path)
    _save(tmp_path / "cat" / "9.png", _colour(200, 100, 50))
    data = load("folder", tmp_path)
    assert data.shape == (3, 4, 4)
    both = torch.cat([data.train.images, data.test.images])
    assert [200, 100, 50] in both[:, :, 0, 0].tolist()
    assert [101, 101, 101] in both[:, :, 0, 0].tolist()


KINDS = {
    "bilevel": (Image.fromarray(_gray(255)).convert("1"), ".png", [255]),
    "palette": (Image.fromarray(_colour(10, 20, 30)).convert("P"), ".gif", None),
    "16 bits": (Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), ".png", [128]),
    "16 bits, white": (Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), ".tif", [255]),
    "alpha": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), ".png", [255, 255, 255]),
    "half alpha": (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), ".png", [204, 204, 204]),
    "gray alpha": (Image.new("LA", (4, 4), (7, 255)), ".png", [7]),
    "cmyk": (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), ".tiff", [255, 255, 255]),
    "upper case": (Image.fromarray(_gray(9)), ".PNG", [9]),
    "bitmap": (Image.fromarray(_colour(1, 2, 3)), ".bmp", [1, 2, 3]),
    "portable": (Image.fromarray(_gray(77)), ".pgm", [77]),
    "webp": (Image.fromarray(_colour(1, 2, 3)), ".webp", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pictures(tmp_path: Path, kind: str) -> None:
    image, suffix, expected = KINDS[kind]
    for name in ("a", "b"):
        for i in range(2):
            _save(tmp_path / name / f"{i}{suffix}", image)
    data = load("folder", tmp_path)
    if expected is not None:
        assert data.train.images[0, :, 0, 0].tolist() == expected
    assert any("transparent" in note for note in data.notes) == ("alpha" in kind)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_photograph_stands_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # white in the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        for i in range(2):
            path = _save(tmp_path / name / f"{i}{suffix}", pixels, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    images = load("folder", tmp_path).train.images
    assert images.shape[2:] == expected.shape[:2]
    assert expected.shape[0] == (16 if orientation < 5 else 32)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - expected).max() == 0
    # An unmoved picture is white in this corner; only the first orientation leaves it there.
    assert (images[0, :, 2, 2].min() > 200) == (orientation in (1, 5))


def test_sizes(tmp_path: Path) -> None:
    _classes(tmp_path)
    assert load("folder", tmp_path, image_size=7).shape == (1, 7, 7)
    assert load("folder", tmp_path, image_size=7).notes == ()
    _save(tmp_path / "cat" / "9.png", _gray(5, 6, 9))
    data = load("folder", tmp_path)
    assert data.shape == (1, 32, 32)
    assert "pictures of 2 sizes were resized to 32 x 32; give image_size" in data.notes[0]
    assert "not square were stretched" in data.notes[1]
    assert len(load("folder", tmp_path, image_size=4).notes) == 1


def test_pictures_of_one_size_keep_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(2):
            _save(tmp_path / name / f"{i}.png", _gray(1, 3, 5))
    data = load("folder", tmp_path)
    assert data.shape == (1, 3, 5)
    assert data.notes == ()


def test_shrinking_averages(tmp_path: Path) -> None:
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    for name in ("a", "b"):
        for i in range(2):
            _save(tmp_path / name / f"{i}.png", board)
    images = load("folder", tmp_path, image_size=4).train.images.float()
    assert 110 < images.min() <= images.max() < 145


def test_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    _classes(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / "more").mkdir()
    (tmp_path / "dog" / ".hidden.png").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").touch()
    data = load("folder", tmp_path)
    assert len(data.train) == 6
    assert data.notes == (f"{tmp_path}: 2 files that are no pictures were left out",)


def test_layouts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"needs two or more folders.*; found nothing there"):
        load("folder", tmp_path)
    with pytest.raises(FormatError, match=r"cannot be read \(No such file"):
        load("folder", tmp_path / "nowhere")
    _save(tmp_path / "cat" / "0.png", _gray(0))
    with pytest.raises(FormatError, match=r"needs two or more folders.*; found cat"):
        load("folder", tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(FormatError, match="dog: has no pictures, so it is no class"):
        load("folder", tmp_path)
    _save(tmp_path / "dog" / "0.png", _gray(0))
    with pytest.raises(FormatError, match="cat: has a single picture, which cannot be both"):
        load("folder", tmp_path)


def test_a_split_that_does_not_match(tmp_path: Path) -> None:
    _classes(tmp_path / "train")
    _classes(tmp_path / "val")
    with pytest.raises(FormatError, match=r"train: .* split needs both .* found cat, dog"):
        load("folder", tmp_path)
    _classes(tmp_path / "test")
    _save(tmp_path / "test" / "eel" / "0.png", _gray(0))
    with pytest.raises(FormatError, match="must have the same classes; eel is in one"):
        load("folder", tmp_path)


def test_a_single_picture_is_enough_with_a_split_of_its_own(tmp_path: Path) -> None:
    _classes(tmp_path / "train", 1)
    _classes(tmp_path / "test", 1)
    assert len(load("folder", tmp_path).train) == 2


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of any size, with the pixels that are given."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "is no picture that can be read"),
        (b"<html>not found</html>", "is no picture that can be read"),
        (_png(10_000, 10_000), "declares 10,000 x 10,000 pixels; the most is 67,108,864"),
        (_png(60_000, 60_000), "is no picture that can be read .Image size .3600000000 pixels"),
        (_png(4, 4, b"\0\1\2"), "is a damaged picture"),
        (_png(0, 4), "is no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "is no picture that can be read"),
    ],
)
def test_a_broken_picture_is_named(tmp_path: Path, raw: bytes, match: str) -> None:
    _classes(tmp_path)
    victim = tmp_path / "dog" / "2.png"
    victim.write_bytes(raw)
    with pytest.raises(FormatError, match=match) as caught:
        load("folder", tmp_path)
    assert str(victim) in str(caught.value)


def test_pixels_without_a_known_range(tmp_path: Path) -> None:
    _classes(tmp_path)
    _save(tmp_path / "cat" / "1.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(FormatError, match=r"1.tif: has pixels of kind 'F'; save it with 8 bits"):
        load("folder", tmp_path)


def test_more_than_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _classes(tmp_path)
    monkeypatch.setattr(folder, "_MOST_BYTES", 1000)
    assert load("folder", tmp_path).shape == (1, 4, 4)
    with pytest.raises(ConfigError, match=r"8 images of 7 x 7 need .* an image_size of at most 6"):
        load("folder", tmp_path, image_size=7)
    assert load("folder", tmp_path, image_size=6).shape == (1, 6, 6)


@settings(max_examples=120)
@given(
    suffix=st.sampled_from([".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=5),
    cut=st.none() | st.floats(0, 1),
)
def test_random_damage(tmp_path_factory, suffix, flips, cut) -> None:
    root = tmp_path_factory.mktemp("pictures")
    for name in ("a", "b"):
        for i in range(2):
            pixels = np.random.RandomState(i).randint(0, 256, (6, 6, 3)).astype(np.uint8)
            path = _save(root / name / f"{i}{suffix}", pixels)
    raw = bytearray(path.read_bytes())
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    path.write_bytes(raw[: None if cut is None else int(cut * len(raw))])
    try:
        data = load("folder", root, image_size=6)
    except FormatError:
        return
    assert isinstance(data, Dataset)
    assert (len(data.train), len(data.test)) == (2, 2)
