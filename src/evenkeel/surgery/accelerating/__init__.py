"""Accelerating: which norm goes with which activation, and a forward that calls them as one.

`own_forward` gives the graph of one module's forward, `written` proves a pair by a class's text,
`blocks` holds them all, `matching` finds the pairs. `remade` changes an object's class, `rewriting`
writes the forward; `layout` and `low_memory` are two things more that `accelerate` may do.
"""
