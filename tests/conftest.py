"""Every test sees the helpers in this folder, and torch with one thread (two test workers share two cores)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
