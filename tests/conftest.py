"""Settings that every test shares."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")
