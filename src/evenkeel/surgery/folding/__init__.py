"""Folding: an inference norm is a map ``x -> s * x + t``, and maps are pushed to linear layers.

`maps` is the map, `expanding` makes one of each norm, `functions` makes modules of layers that are
functions. `operations` and `commuting` say how a map passes, `absorbing` how a layer takes it in,
`pushing` looks for a way, `in_place` sees to what is written over. `leaving` fuses what stays,
`proof` compares.
"""
