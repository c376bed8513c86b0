"""Running a documented command as a reader would, with this environment's programs and without a network."""

import os
import subprocess
import sys
from pathlib import Path

from blocks import ROOT

BIN = Path(sys.executable).parent
FILES = {"question.txt": "What is 2 + 2?\n"}  # what documented commands read
KEPT = ("HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "TMPDIR")


def environment(folder: Path) -> dict[str, str]:
    """No access token, no cache of models, no network, and nothing of a surrounding make."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    offline = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    return {**kept, **offline, "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "100", "TERM": "dumb"}


def run(command: str, folder: Path, typed: str = "") -> tuple[int, str]:
    """Exit code, and what the command prints, both streams as a terminal shows them. It runs in `folder`.

    `make` takes its environment as ready: setting one up needs a network, and has been done for these tests already.
    """
    for name, text in FILES.items():
        (folder / name).write_text(text)
    ready = f"make -f {ROOT / 'Makefile'} BIN={BIN} -o .venv/.installed "
    done = subprocess.run(
        ["sh", "-c", command.replace(".venv/bin/", f"{BIN}/").replace("make ", ready)],
        cwd=folder, env=environment(folder), input=typed, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout
