"""Several processes that train together, as torchrun would start them, and what each of them says at the end.

They come from a fork server that has imported everything once: two processes start in a second instead of ten.
"""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["several", "cabochon.train.parallel", "cabochon.train.run", "torch.distributed.fsdp",
             "torch.distributed.tensor.parallel"]  # fmt: skip


def together(world: int, target: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """What `target(*arguments)` gives in each of so many processes, in order: JSON, or None when the process has died.

    An error of any of them is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, answers = [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        named = target.__code__.co_filename, target.__name__  # a test file has no name that it could be imported by
        process = context.Process(target=_run, args=(rank, world, port, theirs, named, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(mine)
    try:
        return [_answer(answer, seconds) for answer in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(answer: Connection, seconds: float) -> Any:
    assert answer.poll(seconds), "a process does not answer"
    try:
        said = json.loads(answer.recv_bytes())
    except EOFError:
        return None
    assert "error" not in said, said["error"]
    return said["result"]


def _function(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, name)
    return found


def _run(rank: int, world: int, port: int, out: Connection, named: tuple[str, str], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    try:
        said = {"result": _function(*named)(*arguments)}
    except BaseException:
        said = {"error": f"rank {rank}: {traceback.format_exc()}"}
    out.send_bytes(json.dumps(said).encode())
    time.sleep(600)  # the others may have to hear something yet; all end when all have answered
