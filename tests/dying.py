"""A command in a process of its own that is killed when a step begins."""

import os
import subprocess
import sys
from collections.abc import Sequence

_DYING = """
import os, signal, sys
from cabochon.cli.main import main
from cabochon.train.step import Trainer

learn = Trainer.step

def step(self, *arguments):
    if self.step_number == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(self, *arguments)

Trainer.step = step
sys.exit(main({command!r}))
"""


def killed_at(step: int, command: Sequence[str]) -> int:
    """The code of a process that is killed behind so many steps; what it was just saving may be there or not."""
    program = _DYING.format(step=step, command=list(command))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL).returncode
