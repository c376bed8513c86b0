"""The model that all peers run: `peer_model.py PRESET .../hf`; our copies: `peer_model.py FOLDER .../cabochon-int8`.

"2b" has the published shape, for speed. "small" is for `peers.py check`: beside its weights the soft caps are so
low, and its window is so short, that a peer that leaves one of them out gives quite other logits.
"""

import subprocess
import sys
from pathlib import Path

import torch

import cabochon
from cabochon.model.config import Gemma2Config
from cabochon.weights.init import init_folder

SMALL = Gemma2Config(
    vocab_size=8192,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    query_pre_attn_scalar=64,
    sliding_window=32,
    max_position=2048,
    attn_softcap=1.0,
    final_softcap=1.0,
)
# Low caps instead of huge weights: those would let the rounding of bf16 change which key a query looks at.
SHARPEN = 6.0  # times the query and the key matrix: scores of about 4; without the cap, the cosine with it is 0.06
FINAL_NORM = 9.0  # on top of 1: logits of about 3; without the cap, the cosine is 0.88


def make(preset: str, folder: Path) -> None:
    """Write the folder under its name only when it is whole."""
    partial = folder.with_name(f"{folder.name}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if preset == "small":
        init_folder(SMALL, partial, overwrite=True)
        lm = cabochon.load(partial)
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                if name.endswith(("attention.q.weight", "attention.k.weight")):
                    parameter *= SHARPEN
                elif name == "final_norm.weight":
                    parameter += FINAL_NORM
        lm.save(partial, overwrite=True)
    else:
        init_folder(preset, partial, overwrite=True)
    partial.replace(folder)


def quantise(folder: Path, out: Path) -> None:
    """An 8- or 4-bit copy, rounded to the nearest: on random weights a calibration has nothing to gain."""
    partial = out.with_name(f"{out.name}.part")
    words = f"-m cabochon quantize --method rtn --overwrite --bits {out.name[-1]}".split()
    subprocess.run([sys.executable, *words, str(folder), str(partial)], check=True)
    partial.replace(out)


def main() -> None:
    """Command line."""
    source, out = sys.argv[1], Path(sys.argv[2])
    if out.name == "hf":
        make(source, out)
    else:
        quantise(Path(source), out)


if __name__ == "__main__":
    main()
