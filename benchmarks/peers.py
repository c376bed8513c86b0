"""Text generation beside llama.cpp, OpenVINO GenAI and transformers: one random model, every peer in its own process.

    python benchmarks/peers.py setup                   environments and model files, below runs/peers
    python benchmarks/peers.py setup --preset small
    python benchmarks/peers.py check --preset small    does every peer compute the same model, soft caps included?
    python benchmarks/peers.py run --only cabochon-int8,llama-q8,transformers --rounds 3

Run it with the environment that has cabochon, on a machine that does nothing else. A round loads and measures each
candidate once, ours and theirs in turn. The table has medians over the rounds, then ratios, ours to theirs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peer_setup
from peer_measure import Job, Result
from peer_report import physical_cores, print_report, processor

CHECK_PROMPT = 64  # tokens: twice the window of the small model
AGREES, AGREES_AT_4_BITS = 0.99, 0.8  # cosine of the logits with ours in bf16; each left-out part costs more


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a worker, the environment that runs it, and the file that it loads."""

    worker: str
    environment: str | None  # None: the one that runs this
    file: str
    options: dict[str, str] = field(default_factory=dict)
    agrees: float = AGREES


CANDIDATES = {
    "cabochon-bf16": Candidate("peer_cabochon.py", None, "hf"),
    "cabochon-lossless": Candidate("peer_cabochon.py", None, "hf", {"weights": "lossless"}),
    "cabochon-int8": Candidate("peer_cabochon.py", None, "cabochon-int8"),
    "cabochon-int4": Candidate("peer_cabochon.py", None, "cabochon-int4", agrees=AGREES_AT_4_BITS),
    "cabochon-int8-from-bf16": Candidate("peer_cabochon.py", None, "hf", {"weights": "int8"}),
    "cabochon-int4-from-bf16": Candidate("peer_cabochon.py", None, "hf", {"weights": "int4"}, AGREES_AT_4_BITS),
    "llama-bf16": Candidate("peer_llama.py", "llama", "bf16.gguf"),
    "llama-q8": Candidate("peer_llama.py", "llama", "q8_0.gguf"),
    "llama-q4": Candidate("peer_llama.py", "llama", "q4_0.gguf", agrees=AGREES_AT_4_BITS),
    "openvino-int8": Candidate("peer_openvino.py", "openvino", "openvino-int8"),
    "openvino-int4": Candidate("peer_openvino.py", "openvino", "openvino-int4", agrees=AGREES_AT_4_BITS),
    "openvino-int8-f32": Candidate("peer_openvino.py", "openvino", "openvino-int8", {"precision": "f32"}),
    "openvino-int4-f32": Candidate(
        "peer_openvino.py", "openvino", "openvino-int4", {"precision": "f32"}, AGREES_AT_4_BITS
    ),
    "transformers": Candidate("peer_transformers.py", "transformers", "hf"),
}


@dataclass(frozen=True)
class Bench:
    """Where things are and which candidates take part."""

    root: Path
    preset: str
    names: list[str]

    def missing(self, name: str) -> str | None:
        """Why a candidate cannot run, if so."""
        candidate = CANDIDATES[name]
        ready = candidate.environment is None or peer_setup.is_ready(self.root, candidate.environment)
        if ready and self.model(name).exists():
            return None
        return f"not set up: run `peers.py setup --preset {self.preset}`"

    def model(self, name: str) -> Path:
        """The file or folder that a candidate loads."""
        return self.root / self.preset / CANDIDATES[name].file

    def ask(self, name: str, job: Job) -> str:
        """Run a worker; the last line that it prints. Raises `RuntimeError` with its last words."""
        if missing := self.missing(name):
            raise RuntimeError(missing)
        candidate = CANDIDATES[name]
        python = peer_setup.python_of(self.root, candidate.environment)
        command = [str(python), str(peer_setup.HERE / candidate.worker), json.dumps(asdict(job))]
        threads = str(job.threads)
        limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limits})
        if done.returncode:
            words = (done.stderr or done.stdout).strip()
            raise RuntimeError(words.rpartition("\n")[2] or f"ended with status {done.returncode}")
        return done.stdout.strip().rpartition("\n")[2]


def setup(bench: Bench) -> int:
    """Make what is missing of what the chosen candidates need."""
    chosen = [CANDIDATES[name] for name in bench.names]
    for name in dict.fromkeys(c.environment for c in chosen if c.environment):
        peer_setup.environment(bench.root, name)
    # Every other file is made from the folder, and quantised GGUF files from the bf16 one.
    wanted = {"hf"} | {c.file for c in chosen} | ({"bf16.gguf"} if any("gguf" in c.file for c in chosen) else set())
    made = [peer_setup.files(bench.root, bench.preset, name) for name in peer_setup.FILES if name in wanted]
    return 0 if all(made) else 1


def check(bench: Bench, threads: int) -> int:
    """Compare everybody's logits behind one prompt with ours in bf16; fails when somebody's differ."""
    with tempfile.TemporaryDirectory() as folder:
        ours = _logits(bench, "cabochon-bf16", threads, Path(folder))
        failed = False
        for name in bench.names:
            try:
                theirs = _logits(bench, name, threads, Path(folder))
            except RuntimeError as error:
                print(f"{name:<24} {error}")
                continue
            similar, apart = cosine(ours, theirs), max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            differs = similar < CANDIDATES[name].agrees
            print(
                f"{name:<24} cosine {similar:.5f}   largest difference {apart:6.3f}{'   NOT THE SAME MODEL' * differs}"
            )
            failed |= differs
    return int(failed)


def cosine(a: Iterable[float], b: Iterable[float]) -> float:
    """Cosine of the angle between two vectors of one length."""
    ab = aa = bb = 0.0
    for x, y in zip(a, b, strict=True):
        ab, aa, bb = ab + x * y, aa + x * x, bb + y * y
    return float(ab / (aa * bb) ** 0.5)


def _logits(bench: Bench, name: str, threads: int, folder: Path) -> "array[float]":
    path = folder / name
    options = CANDIDATES[name].options
    bench.ask(name, Job(str(bench.model(name)), threads, prompt=CHECK_PROMPT, options=options, logits=str(path)))
    values = array("f")
    values.frombytes(path.read_bytes())
    return values


def run(bench: Bench, settings: dict[str, int]) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Measure the chosen candidates in turn, round by round; results, and why others have none."""
    results: dict[str, list[Result]] = {}
    failures = {name: why for name in bench.names if (why := bench.missing(name))}
    for number in range(settings["rounds"]):
        for name in in_turn(bench.names):
            if name in failures:
                continue
            print(f"round {number + 1}: {name}", file=sys.stderr)
            try:
                results.setdefault(name, []).append(_measure(bench, name, number, settings))
            except RuntimeError as error:
                failures[name] = str(error)
                results.pop(name, None)
    return results, failures


def _measure(bench: Bench, name: str, seed: int, settings: dict[str, int]) -> Result:
    _bring_into_memory(bench.model(name))
    job = Job(
        str(bench.model(name)),
        settings["threads"],
        prompt=settings["prompt"],
        new=settings["new"] + 1,  # the first one belongs to the prefill
        streams=settings["streams"],
        stream_prompt=settings["stream_prompt"],
        seed=seed,
        options=CANDIDATES[name].options,
    )
    return Result(**json.loads(bench.ask(name, job)))


def _bring_into_memory(path: Path) -> None:
    """Read files once, so that loading measures the program and not the disk."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as data:
            while data.read(2**24):
                pass


def in_turn(names: list[str]) -> list[str]:
    """Ours and theirs alternating for as long as there are both, so that a drift of the machine meets both alike."""
    ours = [n for n in names if is_ours(n)]
    theirs = [n for n in names if not is_ours(n)]
    paired = [n for pair in zip(ours, theirs, strict=False) for n in pair]
    return paired + ours[len(theirs) :] + theirs[len(ours) :]


def is_ours(name: str) -> bool:
    """Whether a candidate is this package."""
    return CANDIDATES[name].environment is None


def main() -> int:
    """Command line."""
    options = _options()
    bench = Bench(options.root, options.preset, options.only)
    if options.verb == "setup":
        return setup(bench)
    if options.verb == "check":
        return check(bench, options.threads)
    keys = ("threads", "rounds", "prompt", "new", "streams", "stream_prompt")
    settings = {key: getattr(options, key) for key in keys}
    results, failures = run(bench, settings)
    if options.json:
        rounds = {name: [asdict(r) for r in found] for name, found in results.items()}
        about = {"processor": processor(), "preset": bench.preset, **settings}
        print(json.dumps({**about, "results": rounds, "failures": failures}))
    else:
        print_report(results, failures, {name for name in CANDIDATES if is_ours(name)}, settings)
    return 0 if results else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["setup", "check", "run"])
    parser.add_argument("--only", type=_names, default=list(CANDIDATES), help=f"of {','.join(CANDIDATES)}")
    parser.add_argument("--preset", default="2b", choices=["2b", "small"])
    parser.add_argument(
        "--root", type=Path, default=peer_setup.HERE.parent / "runs" / "peers", help="where all is kept"
    )
    parser.add_argument("--threads", type=int, default=physical_cores(), help="all physical cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt of one stream")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded behind each prompt")
    parser.add_argument("--streams", type=int, default=16, help="several streams at once; 0: leave this part out")
    parser.add_argument("--stream-prompt", type=int, default=128, help="tokens of the prompt of each of them")
    parser.add_argument("--json", action="store_true", help="every round of every candidate, for a program")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise argparse.ArgumentTypeError(f"no candidate named {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
