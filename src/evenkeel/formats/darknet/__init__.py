"""Darknet's networks: .cfg and .weights, as pjreddie's and AlexeyAB's programs write them.

    from evenkeel.formats import darknet

    network = darknet.load("yolov3.cfg", "yolov3.weights")
    darknet.save(network, "new.cfg", "new.weights")

With batch_normalize a layer's ``biases`` are beta and its ``scales`` gamma; the convolution has no
bias of its own. Its statistics are torch's running ones, of momentum 0.01.
"""

from __future__ import annotations

from .files import load
from .network import Network
from .saving import Saved, save

__all__ = ["Network", "Saved", "load", "save"]
