"""Other programs' files: a package for each, with the same two verbs, `load` and `save`."""

from __future__ import annotations

__all__ = ["darknet", "keras"]

from . import darknet, keras
