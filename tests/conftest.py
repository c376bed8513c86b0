"""Every test sees the helpers in this folder, and torch with one thread (two test workers share two cores)."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
# No test measures time: on a machine that does other things, any example may take a second.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
