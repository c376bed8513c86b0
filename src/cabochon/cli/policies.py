"""Policies of WARP trained by `cabochon train policy`, each in a process of its own, so many at a time or by Ray."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cabochon.base.errors import Elsewhere, MissingResource
from cabochon.base.files import atomic_write
from cabochon.base.toml import toml_value

if TYPE_CHECKING:
    from cabochon.recipe.warp import Policy

_CHILD = "import sys; from cabochon.cli.policies import child; sys.exit(child(sys.argv[1:]))"
_PDEATHSIG = 1  # of prctl on Linux
_LOOK_SECONDS = 0.05  # between looks at processes
_SAID_SECONDS = 5.0  # for the last words of one that has ended: a reward that hangs may hold the pipe


class Signalled(Exception):
    """A signal ended the training; policies have been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Trainer:
    """Called with policies, trains them.

    Args:
        told: what each of them is told, as flags of `cabochon train policy`.
        places: for each policy that is trained at the same time, what is changed in its environment.
    """

    told: Mapping[str, Any]
    places: Sequence[Mapping[str, str]]

    def __call__(self, policies: "Sequence[Policy]") -> None:
        """Train all.

        Raises:
            Elsewhere: one of them has failed and said why.
            MissingResource: one was killed.
            Signalled: a signal came; it was handed on.
        """
        from cabochon.train.stop import noted_signals

        waiting, running, free = list(policies), dict[int, _Running](), list(range(len(self.places)))
        with noted_signals() as came:
            try:
                while waiting or running:
                    while waiting and free:
                        place = free.pop(0)
                        running[place] = self._start(waiting.pop(0), place)
                    time.sleep(_LOOK_SECONDS)
                    for place in [place for place, one in running.items() if one.process.poll() is not None]:
                        running.pop(place).check()
                        free.append(place)
                    if came():
                        raise Signalled(came())
            finally:
                for one in running.values():
                    one.process.terminate()
                for one in running.values():
                    one.wait()

    def command(self, policy: "Policy") -> list[str]:
        """What trains a policy, behind `cabochon`; its flags are written to a file first."""
        settings = policy.out.with_name(f"{policy.out.name}.toml")
        settings.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(settings) as file:
            lines = (f"{name} = {toml_value(value)}\n" for name, value in self.flags(policy).items())
            file.write("".join(lines).encode())
        return ["train", "policy", str(policy.start), "--config", str(settings), "--out", str(policy.out)]

    def flags(self, policy: "Policy") -> dict[str, Any]:
        """What a policy is told, by name."""
        own: dict[str, Any] = {"seed": policy.seed, "steps": policy.steps, "save_dtype": "float32"}
        if policy.points:
            every = max(1, policy.steps // policy.points)
            own |= {"reference": "start", "save_every": every, "keep": policy.steps // every + 1}
        if self.told.get("lora_rank"):
            own["merge_adapters"] = True
        return {"reference": "ema", **self.told, **own}

    def _start(self, policy: "Policy", place: int) -> "_Running":
        alone = len(self.places) == 1
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(os.getpid()), *self.command(policy)],
            env=os.environ | self.places[place],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if alone else subprocess.PIPE,
            text=True,
        )
        return _Running(process, policy.out, _repeated(process.stderr, policy.out.name) if process.stderr else None)


@dataclass(frozen=True)
class RayTrainer(Trainer):
    """The same by tasks of Ray, all at once as far as Ray has room.

    Args:
        gpus, cpus: of each policy; cores where it has no GPU.

    Raises `MissingResource` where there is no Ray.
    """

    gpus: float = 0.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        try:
            import ray  # noqa: F401 - before anything is written, let alone trained
        except ModuleNotFoundError as error:
            raise MissingResource("there is no Ray here", str(error), "pip install 'cabochon[ray]'") from None

    def __call__(self, policies: "Sequence[Policy]") -> None:
        """Train all. Raises as `Trainer`."""
        from cabochon.deploy.ray_commands import carry_out
        from cabochon.deploy.ray_connection import connected
        from cabochon.train.stop import noted_signals

        commands = {policy.out.name: self.command(policy) for policy in policies}
        with connected(), noted_signals() as came:
            failed = carry_out(_CHILD, commands, came, gpus=self.gpus, cpus=self.cpus)
            if came():
                raise Signalled(came())
        if failed:
            for line in failed.said:
                print(f"{failed.name}: {line}", end="", file=sys.stderr)
            outcome(next(policy.out for policy in policies if policy.out.name == failed.name), failed.code)


@dataclass(frozen=True)
class _Running:
    process: "subprocess.Popen[str]"
    out: Path
    repeated: threading.Thread | None

    def wait(self) -> int:
        """Until it has ended and all that it said is repeated; its code."""
        code = self.process.wait()
        if self.repeated:
            self.repeated.join(_SAID_SECONDS)
        return code

    def check(self) -> None:
        """Raise what `Trainer` says, unless it went well."""
        outcome(self.out, self.wait())


def outcome(out: Path, code: int) -> None:
    """Raise what `Trainer` says of a policy whose process has ended with this code."""
    if code > 0:
        raise Elsewhere(code)
    if code < 0:
        raise MissingResource(
            f"the training of {out} was ended",
            f"it got signal {-code}",
            "give the same command again: it goes on from the last checkpoint",
        )


def _repeated(lines: IO[str], name: str) -> threading.Thread:
    """What a policy says, with its name."""

    def repeat() -> None:
        for line in lines:
            print(f"{name}: {line}", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    return thread


def places(parallel: int) -> list[dict[str, str]]:
    """Changes to the environment of so many processes; 0: one for each GPU.

    Each gets a GPU of its own while there are some, and its share of the processor's cores.
    """
    import torch

    gpus = torch.cuda.device_count()
    count = parallel or max(1, gpus)
    if count == 1:
        return [{}]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(gpus)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    shared = {"OMP_NUM_THREADS": threads}
    return [shared | ({"CUDA_VISIBLE_DEVICES": names[n % gpus]} if gpus else {}) for n in range(count)]


def child(arguments: Sequence[str]) -> int:
    """The process of one policy: the number of its parent, with which it ends however that ends, and a command."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            return 1
    from cabochon.cli.main import main

    return main(command)
