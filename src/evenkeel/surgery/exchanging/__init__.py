"""Exchanging: `kinds` says what a norm is and for which rank, `edits` what makes another of it.

`patterned` knows other statistics, groups and patterns; `becoming` does it and undoes it.
"""
