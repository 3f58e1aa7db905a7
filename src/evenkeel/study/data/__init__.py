"""Data sets for studies, by name: read strictly, whole or not at all, with a fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...errors import ConfigError
from .base import Dataset as Dataset
from .base import Split as Split

__all__ = ["NAMES", "Dataset", "Split", "load"]

NAMES: Final = ("digits", "mnist", "fashion-mnist", "cifar10", "idx", "folder")
_PUBLIC: Final = ("mnist", "fashion-mnist", "cifar10")


def load(
    name: str,
    folder: Path | None = None,
    *,
    download: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """Loads a data set into memory.

    ==============  ==============================================================================
    digits          8x8 digits that come with scikit-learn; no files
    mnist           four IDX files; downloaded when no folder is given
    fashion-mnist   the same
    cifar10         the binary or the Python archive, packed or not; downloaded without a folder
    idx             any four IDX files with the names of MNIST's; needs a folder
    folder          images in ``train/<class>`` and ``test/<class>``, or in ``<class>``
    ==============  ==============================================================================

    Args:
        name: one of `NAMES`.
        folder: where the files lie. Nothing is ever downloaded into it. Without it the public data
            sets come from the cache, ``$EVENKEEL_DATA`` or the user's cache folder.
        download: whether what the cache lacks may be downloaded.
        image_size: 'folder' only: height and width that images are resized to.

    Raises:
        ConfigError: an unknown name, or an option that this data set does not have.
        FormatError: a file is missing, damaged, or not what it should be.
        StudyError: a file could not be downloaded.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown data set '{name}'; choose one of {', '.join(NAMES)}")
    if image_size is not None and (name != "folder" or image_size < 1):
        why = "must be at least 1" if name == "folder" else "is for 'folder' only"
        raise ConfigError(f"image_size={image_size} {why}; '{name}' was asked for")
    if folder is not None:
        folder = Path(folder).expanduser()
    if name == "digits":
        if folder is not None:
            raise ConfigError(f"'digits' has no files, but got the folder {folder}; leave it out")
        from . import digits

        return digits.load()
    if folder is None:
        if name not in _PUBLIC:
            raise ConfigError(f"'{name}' needs the folder that the files are in; give --data-dir")
        from .download import ensure

        folder = ensure(name, download)
    return _read(name, folder, image_size)


def _read(name: str, folder: Path, image_size: int | None) -> Dataset:
    # Imported on use, so that a study of MNIST does not load an image library.
    if name == "folder":
        from .folder import load as load_pictures

        return load_pictures(folder, image_size)
    if name == "cifar10":
        from . import cifar

        return cifar.load(folder)
    from . import idx

    readers = {"mnist": idx.load_mnist, "fashion-mnist": idx.load_fashion, "idx": idx.load_idx}
    return readers[name](folder)
