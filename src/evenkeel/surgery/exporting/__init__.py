"""Exporting: `programs` makes the files that other runtimes read, and runs them to compare."""
