"""Backends: five verbs on a view, and the rule that chooses who runs them.

``stats -> merge -> apply`` forward, ``backward_reduce -> backward_dx`` backward. `contract` says
what each verb means, `reference` is the plain-torch backend that every other one is held to, and
`select` names the backend for a call and the reason.
"""
