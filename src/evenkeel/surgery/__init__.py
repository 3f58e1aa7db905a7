"""Editing built networks: a file for each verb, and a room for what needs more than a file.

`introduce` puts norms in, `fold` takes them out and `unfold` puts them back, `export` writes what
is left to files, `exchange` makes other norms of norms, `accelerate` swaps torch's for ours,
`recalibrate` and `freeze` care for running statistics. `graph` traces and names what is where,
`batch_norms` finds norms by name, `fused` knows what activations a norm can do, `examples` runs a
network on what the user gives, `comparing` says whether two networks are the same. Every edit works
on a copy, unless told otherwise, and returns it with a report; on failure nothing changed.
"""
