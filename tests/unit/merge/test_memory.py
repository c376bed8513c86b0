"""Memory that merging takes: that of the blocks in flight, whatever the size of a tensor. In a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cabochon.merge.methods import METHODS

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

MEASURE = """
import json, re, sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def run(name, rows, pool):
    method = METHODS[name]
    per = {p.name: 0.5 for p in method.parameters if p.per_model and p.name in ("weight", "density")}
    shared = {p.name: 0.5 for p in method.parameters if p.name in ("t", "eta")}
    count = method.models[0] if method.models[1] else max(2, method.models[0])
    base = None if method.base == "none" else inputs[0][:rows]
    whole = Whole(tuple(t[:rows] for t in inputs[1 : count + 1]), base, run=pool.map)
    merge(method, whole, bind(method, shared, [per] * count), lambda start, values: None)

inputs = [torch.randn(1 << 15, 1 << 10).bfloat16() for _ in range(4)]  # 32 blocks each
grown = {}
with ThreadPoolExecutor(2, initializer=lambda: torch.set_num_threads(1)) as pool:
    for name in sys.argv[1:]:
        run(name, 1 << 12, pool)  # what blocks in flight take, and first uses
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest use so far
        before = memory("VmRSS")
        run(name, 1 << 15, pool)
        grown[name] = memory("VmHWM") - before
print(json.dumps(grown))
"""


def test_no_method_takes_more_memory_for_a_larger_tensor() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, *METHODS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown.keys() == METHODS.keys()
    # 4 MB would stay behind for each of 28 more blocks if their memory were not used again.
    assert {name: mb for name, mb in grown.items() if mb > 60} == {}, grown
