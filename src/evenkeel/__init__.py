"""Batch normalization for CNNs, on an even keel."""
__version__ = "0.1.0"
