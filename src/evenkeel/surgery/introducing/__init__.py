"""Introducing: `places` says where norms go, `calibrate` gives them the data's statistics."""
