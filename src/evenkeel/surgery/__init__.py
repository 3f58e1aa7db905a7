"""Editing built networks: put batch norm in, take it out again.

`graph` traces and names what is where, `introduce` inserts norms, `fold` merges them into the layer
before, `accelerate` swaps torch's for ours. Every edit works on a copy, unless told otherwise, and
returns it with a report; on failure nothing has changed.
"""
