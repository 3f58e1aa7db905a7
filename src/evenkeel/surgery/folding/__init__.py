"""Folding: an inference norm is a map ``x -> s * x + t``, and maps are pushed to linear layers.

`maps` is the map, `expanding` makes one of each norm, `commuting` says how it passes an operation,
`absorbing` how a layer takes it in, `pushing` looks for a way, `leaving` fuses what stays, `proof`
compares.
"""
