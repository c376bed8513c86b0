"""What this machine has: cores, instruction sets, memory, and how fast it reads memory. Linux and macOS."""

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that decide which kernels run, as /proc/cpuinfo and sysctl name them, fastest first.
_SETS = {
    "amx_bf16": "AMX bf16", "amx_int8": "AMX int8", "avx512_bf16": "AVX512 bf16", "avx512_vnni": "AVX512 VNNI",
    "avx512f": "AVX512", "avx_vnni": "AVX VNNI", "avx2": "AVX2", "i8mm": "I8MM", "bf16": "BF16", "sve": "SVE",
    "asimd": "NEON", "arm": "NEON",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, bandwidth in bytes per second."""

    processor: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory: int
    free_memory: int
    gpus: tuple[str, ...]
    gpu_memory: int  # of the first one; 0 without
    read_bandwidth: float  # of the memory that weights would be read from

    @property
    def has_gpu(self) -> bool:
        return bool(self.gpus)


def inspect() -> Machine:
    """Look at the machine and read half a GiB of its memory a few times (about half a second)."""
    import torch

    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    total, free = _memory()
    return Machine(
        processor=_processor(),
        cores=usable_cores(),
        instruction_sets=_instruction_sets(),
        memory=total,
        free_memory=free,
        gpus=gpus,
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpus else 0,
        read_bandwidth=read_bandwidth("cuda" if gpus else "cpu"),
    )


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that it has freed, for the next ones of their size.

    glibc otherwise hands every large block back to the system and faults it in again, page by page: a quarter of the
    time of prefilling and of training. Without effect where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def keep_few_kernels() -> None:
    """Let oneDNN keep the machine code of 128 shapes of matrices that it multiplied, the latest ones.

    Otherwise it keeps 1024, half a MB each, and torch's cache in front of it holds on to as many more, which saves no
    time. Without effect once 16-bit floats have been multiplied, and on what the environment says already.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def usable_cores() -> int:
    """Cores that this process may run on, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: str) -> int:
    """Bytes that can still be taken on a torch device, caches of files counted as free."""
    if not device.startswith("cuda"):
        return _memory()[1]
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if found:
        return found[1].strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set(platform.machine()[:3].split())
    return tuple(dict.fromkeys(name for flag, name in _SETS.items() if flag in flags))


def _memory() -> tuple[int, int]:
    """Total and free bytes; a container's limit counts as the total."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        total = int(_sysctl("hw.memsize") or 0)
        return total, total
    fields = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)}
    total = fields["MemTotal"]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total, min(fields.get("MemAvailable", total), total)


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read_bandwidth(device: str) -> float:
    """Bytes per second of the best of five reductions over 512 MiB, more than any cache holds.

    On a GPU, where starting a reduction takes as long as a good part of it: bytes read and written by copies.
    """
    import torch

    if device.startswith("cuda"):
        return _copy_bandwidth(device)
    data = torch.ones(2**27, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float(data.sum())  # reading the result waits for a GPU to finish
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def _copy_bandwidth(device: str) -> float:
    import torch

    source = torch.ones(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        target.copy_(source)
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after) / 1000)
    return (source.nbytes + target.nbytes) / best
