"""What the tests of packed convolutions share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from evenkeel.nn.packed import pack_module

TOLERANCE = 2e-6
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    ("leaky_relu", 0.2): lambda y: F.leaky_relu(y, 0.2),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def packed(conv, activation=None):
    own = copy.deepcopy(conv)
    pack_module(own, activation)
    return own


def way(conv):
    """Which way the last input went."""
    return None if conv._way is None else conv._way.name


def off(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))


@torch.no_grad()
def assert_same(conv, own, x, function=ACTIVATIONS[None]):
    # in double precision: two orders of summing are each off by their own rounding
    wide = copy.deepcopy(conv).double()
    difference = off(own(x).double(), function(wide(x.double())))
    assert difference <= TOLERANCE, difference


def conv_and_input(channels=16, size=9, batch=2, **settings):
    settings = {"kernel_size": 3, "padding": 1} | settings
    return nn.Conv2d(channels, 24, **settings).eval(), torch.randn(batch, channels, size, size)


def in_threads(run: Callable[[int], None]) -> None:
    """Four at once, each with a number of its own."""
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
