"""A folder of pictures: one folder a class, with or without a split of its own."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import ConfigError, first_line
from .base import Dataset, Split, found_in, refuse, shuffled, stratified

__all__ = ["load", "read_picture"]

_SUFFIXES: Final = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_PIXELS: Final = 2**26
_MOST_BYTES: Final = 2**32
_DEFAULT_SIZE: Final = 32
_GRAY: Final = frozenset({"1", "L", "LA", "I;16", "I;16L", "I;16B"})
_COLOUR: Final = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"})
_CLEAR: Final = frozenset({"LA", "PA", "RGBA", "RGBa"})
_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture stand upright, by the orientation that its camera wrote; from 5 on, height
and width change places."""


class _Picture(NamedTuple):
    """What the header of a picture says; height and width are those of the upright picture."""

    path: Path
    label: int
    height: int
    width: int
    gray: bool
    clear: bool
    orientation: int


def load(folder: Path, image_size: int | None = None) -> Dataset:
    """Reads ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*`` and splits it.

    Our split takes a quarter of each class for testing; it depends on the sorted file names alone.
    Pictures are gray if all are gray, else in colour; they stand upright as their camera says;
    transparent ones are laid on white; of an animation the first picture is taken. The training
    order is a fixed random one, so that the first pictures are a fair sample of the classes.

    Args:
        folder: the root.
        image_size: height and width of every image; left out, the size that all pictures have,
            else 32.

    Raises:
        FormatError: a picture is damaged, or the folders are not laid out like this.
        ConfigError: the images would not fit in memory at this size.
    """
    has_split = (folder / "train").is_dir() and (folder / "test").is_dir()
    if has_split:
        classes, train, ignored = _listed(folder / "train")
        others, test, more = _listed(folder / "test")
        ignored += more
        if classes != others:
            differ = ", ".join(sorted(set(classes) ^ set(others)))
            raise refuse(folder, f"train and test must have the same classes; {differ} is in one")
    else:
        classes, train, ignored = _listed(folder)
        test = []
    pictures = [_header(path, label) for path, label in (*train, *test)]
    height, width, notes = _size(folder, pictures, image_size)
    if ignored:
        notes.append(f"{folder}: {ignored:,} files that are no pictures were left out")
    images = _decode(pictures, height, width)
    labels = np.array([picture.label for picture in pictures], np.int64)
    if has_split:
        order = torch.arange(len(labels))
        at = order[: len(train)], order[len(train) :]
    else:
        _check_counts(folder, classes, labels)
        at = stratified(labels)
    parts = [Split(torch.from_numpy(images)[i], torch.from_numpy(labels)[i]) for i in at]
    return Dataset("folder", shuffled(parts[0]), parts[1], classes, notes=tuple(notes))


def _listed(root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]], int]:
    """The classes below a folder, the files of each, and how many files are no pictures."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found: list[tuple[Path, int]] = []
        ignored = 0
        for label, place in enumerate(folders):
            visible = sorted(p for p in place.iterdir() if not p.name.startswith("."))
            files = [p for p in visible if p.suffix.lower() in _SUFFIXES and p.is_file()]
            if not files:
                raise refuse(
                    place,
                    "has no pictures, so it is no class; put some in or take the folder away (a "
                    f"split needs both 'train' and 'test'); {found_in(place)}",
                )
            ignored += len(visible) - len(files)
            found += [(path, label) for path in files]
    except OSError as error:
        raise refuse(root, f"cannot be read ({error.strerror or error})") from error
    if len(folders) < 2:
        raise refuse(
            root,
            "needs two or more folders, one for each class, either here or in 'train' and 'test'; "
            f"{found_in(root)}",
        )
    return tuple(place.name for place in folders), found, ignored


def _check_counts(folder: Path, classes: Sequence[str], labels: np.ndarray) -> None:
    for label, count in sorted(Counter(labels.tolist()).items()):
        if count < 2:
            raise refuse(
                folder / classes[label],
                "has a single picture, which cannot be both for training and for testing; add one, "
                "or lay out 'train' and 'test' yourself",
            )


def _open(path: Path) -> Image.Image:
    """Opens a picture without decoding it, and refuses one that is too large to decode."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; we refuse them below. Odd metadata is no harm.
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=_FORMATS)
    except Exception as error:  # Pillow's decoders raise whatever their libraries do
        raise refuse(path, f"is no picture that can be read ({first_line(error)[:200]})") from error
    if image.width * image.height > _MOST_PIXELS:
        image.close()
        raise refuse(
            path,
            f"declares {image.width:,} x {image.height:,} pixels; the most is {_MOST_PIXELS:,}",
        )
    return image


def _header(path: Path, label: int) -> _Picture:
    with _open(path) as image:
        if image.mode not in _GRAY | _COLOUR:
            raise refuse(path, f"has pixels of kind '{image.mode}'; save it with 8 bits a channel")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                orientation = _orientation(image)
        except Exception as error:  # as above
            raise refuse(path, f"has damaged metadata ({first_line(error)[:200]})") from error
        width, height = image.size[::-1] if orientation >= 5 else image.size
        clear = image.mode in _CLEAR or "transparency" in image.info
        return _Picture(path, label, height, width, image.mode in _GRAY, clear, orientation)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8."""
    # Pillow turns TIFFs itself, and would decode a whole PNG to look for the metadata at its end.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    found = image.getexif().get(_ORIENTATION)
    return found if found in _TURNS else 1


def _size(
    folder: Path, pictures: Sequence[_Picture], image_size: int | None
) -> tuple[int, int, list[str]]:
    """Height and width of all images, and notes on how they came about."""
    sizes = Counter((picture.height, picture.width) for picture in pictures)
    (height, width), _ = sizes.most_common(1)[0]
    notes = []
    if image_size is not None or len(sizes) > 1:
        size = image_size or _DEFAULT_SIZE
        if len(sizes) > 1 and image_size is None:
            notes.append(
                f"{folder}: pictures of {len(sizes):,} sizes were resized to {size} x {size}; "
                "give image_size for another"
            )
        if any(h != w for h, w in sizes):
            notes.append(f"{folder}: pictures that are not square were stretched to a square")
        height = width = size
    clear = sum(picture.clear for picture in pictures)
    if clear:
        notes.append(f"{folder}: {clear:,} transparent pictures were laid on white")
    needed = len(pictures) * height * width * 3
    if needed > _MOST_BYTES:
        raise ConfigError(
            f"{folder}: {len(pictures):,} images of {height} x {width} need {needed / 2**30:.0f} "
            f"GiB; give an image_size of at most "
            f"{math.isqrt(_MOST_BYTES // (3 * len(pictures)))}"
        )
    return height, width, notes


def _decode(pictures: Sequence[_Picture], height: int, width: int) -> np.ndarray:
    """The pixels of all pictures, (n, 1, h, w) if all are gray, else (n, 3, h, w)."""
    mode = "L" if all(picture.gray for picture in pictures) else "RGB"
    images = np.empty((len(pictures), len(mode), height, width), np.uint8)
    for index, picture in enumerate(pictures):
        images[index] = _pixels(picture, mode, (width, height))
    return images


def _pixels(picture: _Picture, mode: str, size: tuple[int, int]) -> np.ndarray:
    """The pixels of one picture, (1, h, w) or (3, h, w)."""
    with _open(picture.path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = np.asarray(_finish(image, picture, mode, size))
        except Exception as error:  # as above
            raise refuse(
                picture.path, f"is a damaged picture ({first_line(error)[:200]})"
            ) from error
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def read_picture(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One picture as (c, h, w) bytes, read as `load` reads those of a folder.

    Upright as its camera says, a transparent one laid on white, gray or in colour as ``c`` says,
    and stretched to the size.

    Raises:
        FormatError: it is missing, damaged, or no picture.
        ConfigError: pictures have 1 or 3 channels, and the shape has another number.
    """
    channels, height, width = shape
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ConfigError(f"a picture has 1 or 3 channels, but {channels} are wanted")
    if not path.is_file():
        raise refuse(path, "is a folder, not a picture" if path.is_dir() else "does not exist")
    pixels = _pixels(_header(path, 0), modes[channels], (width, height))
    return torch.from_numpy(np.array(pixels, np.uint8))


def _finish(image: Image.Image, picture: _Picture, mode: str, size: tuple[int, int]) -> Image.Image:
    """Decodes a picture, turns it upright, lays it on white and resizes it."""
    image.load()
    result = image
    if picture.orientation in _TURNS:
        result = result.transpose(_TURNS[picture.orientation])
    if result.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255; the first eight of them are meant.
        wide = np.asarray(result).astype(np.uint32)
        result = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if picture.clear:
        result = result.convert("RGBA")
        white = Image.new("RGBA", result.size, "white")
        result = Image.alpha_composite(white, result)
    result = result.convert(mode)
    return result if result.size == size else result.resize(size, Image.Resampling.BILINEAR)
