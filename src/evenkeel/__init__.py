"""Batch normalization for CNNs, on an even keel."""
