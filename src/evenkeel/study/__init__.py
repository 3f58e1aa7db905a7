"""Studies: train a network with and without batch norm, and say how sure we are."""
