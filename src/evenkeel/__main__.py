"""``python -m evenkeel``: the command line, where no ``evenkeel`` is on the path."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
