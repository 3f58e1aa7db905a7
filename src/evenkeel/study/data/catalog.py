"""The public data sets: their files, checksums, mirrors and classes. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "CIFAR10",
    "CIFAR10_ARCHIVE",
    "CIFAR10_PYTHON_MD5",
    "DIGITS",
    "FASHION",
    "FASHION_FILES",
    "MNIST_FILES",
    "MNIST_MD5",
    "Remote",
]


@dataclass(frozen=True)
class Remote:
    """A file to download: its name, the MD5 and length that it must have, and where it lies."""

    name: str
    md5: str
    size: int
    urls: tuple[str, ...]


_MNIST_MIRRORS: Final = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_MIRRORS: Final = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)


def _remotes(mirrors: tuple[str, ...], *files: tuple[str, str, int]) -> tuple[Remote, ...]:
    return tuple(Remote(n, md5, size, tuple(m + n for m in mirrors)) for n, md5, size in files)


MNIST_FILES: Final = _remotes(
    _MNIST_MIRRORS,
    ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
    ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
    ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
)
FASHION_FILES: Final = _remotes(
    _FASHION_MIRRORS,
    ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
    ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
    ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
    ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
)
CIFAR10_ARCHIVE: Final = Remote(
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    170_052_171,
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
)

MNIST_MD5: Final = {
    "train-images": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels": "a25bea736e30d166cdddb491f175f624",
    "t10k-images": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of each unpacked file: those who pack again change the .gz, but not what is in it."""

CIFAR10_PYTHON_MD5: Final = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}

DIGITS: Final = tuple(str(d) for d in range(10))
FASHION: Final = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CIFAR10: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
