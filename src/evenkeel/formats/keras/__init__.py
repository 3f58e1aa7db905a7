"""Keras's models: .keras files of Keras 3 and .h5 files, read into torch's layers.

from evenkeel.formats import keras

network = keras.load("model.keras")
"""

from __future__ import annotations

from .network import Network, load

__all__ = ["Network", "load"]
