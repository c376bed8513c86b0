"""Merging beside mergekit: two random models, each program in its own process, in turn.

    python benchmarks/merging.py setup                     mergekit's environment and two models, below runs/peers
    python benchmarks/merging.py run --methods linear,ties --rounds 1

Run it with the environment that has cabochon, on a machine that does nothing else. Before each measurement the inputs
are read once, so that they lie in memory as far as it goes; --cold has the system forget them instead. "copy" reads
both models and copies one, to the disk. Ours ends when all is on the disk, too; mergekit does not wait.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import peer_setup

VERSION = "mergekit==0.1.5"
METHODS = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}\n",
    "slerp": "merge_method: slerp\nbase_model: A\nparameters: {t: 0.4}\n",
    "ties": "merge_method: ties\nbase_model: A\nparameters: {weight: 1.0, density: 0.5}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: A\nparameters: {weight: 1.0, density: 0.5}\n",
}
MODELS = "models:\n  - model: A\n  - model: B\n"
COPY = """
import os, shutil, sys
*inputs, out = sys.argv[1:]
buffer = bytearray(1 << 24)
for path in inputs:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
os.makedirs(out)
for path in inputs[: len(inputs) // 2]:
    target = os.path.join(out, os.path.basename(path))
    shutil.copyfile(path, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
"""


def weights(root: Path) -> list[Path]:
    """The weight files of both models, the first model's first."""
    return [file for name in "ab" for file in sorted((root / "merge" / name).glob("*.safetensors"))]


def setup(root: Path, preset: str) -> None:
    """Make what is missing."""
    peer_setup.ENVIRONMENTS["mergekit"] = peer_setup.Environment((peer_setup.TORCH, (*peer_setup.TORCH, VERSION)))
    peer_setup.environment(root, "mergekit")
    for seed, name in enumerate("ab"):
        folder = root / "merge" / name
        if not folder.exists():
            cabochon = Path(sys.executable).with_name("cabochon")
            command = [cabochon, "init", "--preset", preset, "--seed", str(seed), "--out", folder]
            subprocess.run(command, check=True)


def commands(root: Path, method: str) -> dict[str, list[str]]:
    """What each program is called with; the last argument is the folder to write."""
    text = (MODELS + METHODS[method]).replace(": A", f": {root}/merge/a").replace(": B", f": {root}/merge/b")
    config = root / "merge" / f"{method}.yml"
    config.write_text(f"{text}dtype: bfloat16\n")
    out = str(root / "merge" / "out")
    return {
        "copy": [sys.executable, "-c", COPY, *map(str, weights(root)), out],
        "cabochon": [str(Path(sys.executable).with_name("cabochon")), "merge", str(config), out],
        "mergekit": [str(root / "mergekit" / "bin" / "mergekit-yaml"), str(config), out],
    }


def prepare(root: Path, *, cold: bool) -> None:
    """Bring the inputs into memory, or have them forgotten."""
    shutil.rmtree(root / "merge" / "out", ignore_errors=True)
    os.sync()
    for path in weights(root):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most GB of memory of its own, mapped files aside."""
    started = time.perf_counter()
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **quiet})
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], anonymous(process.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed: {errors.decode(errors='replace')[-800:]}")
    return seconds, peak[0]


def anonymous(pid: int) -> float:
    """GB of memory that no file stands behind."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def rows(root: Path, methods: list[str], rounds: int, *, cold: bool) -> Iterator[str]:
    """The lines of the table: medians over the rounds, and ratios to what we need."""
    yield f"{'':<12}{'program':<12}{'seconds':>10}{'peak GB':>10}{'x ours':>10}"
    for method in methods:
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for program, command in commands(root, method).items():
                prepare(root, cold=cold)
                found.setdefault(program, []).append(measure(command))
        medians = {program: statistics.median(s for s, _ in runs) for program, runs in found.items()}
        for program, seconds in medians.items():
            peak = max(peak for _, peak in found[program])
            yield f"{method:<12}{program:<12}{seconds:>10.1f}{peak:>10.2f}{seconds / medians['cabochon']:>10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("setup", "run"))
    parser.add_argument("--preset", default="2b")
    parser.add_argument("--root", type=Path, default=Path("runs/peers"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cold", action="store_true")
    chosen = parser.parse_args()
    root = chosen.root.resolve()
    if chosen.what == "setup":
        setup(root, chosen.preset)
        return
    for line in rows(root, chosen.methods.split(","), chosen.rounds, cold=chosen.cold):
        print(line, flush=True)


if __name__ == "__main__":
    main()
