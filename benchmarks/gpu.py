"""Decoding and prefill on a GPU, beside transformers on the same machine, on randomly initialised models.

    python benchmarks/gpu.py --sizes 2b 9b --weights bf16 int8 int4

Weights are drawn on the GPU, so that nothing of their size is read or written. Prints tokens per second, the share of
the time that reading weights and cache once would take at the bandwidth measured before, and ratios to transformers
(bfloat16, its eager attention, which is its own default for Gemma 2, logits of the last token only).
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cabochon.lm.measure import Measured, measure
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import PackedWeight
from cabochon.weights.quantize import use_packed_layers
from cabochon.weights.scheme import Scheme

BITS = {"int8": 8, "int4": 4}
DEVIATION = 0.02


@torch.inference_mode()
def random_model(config: Gemma2Config, weights: str) -> Gemma2:
    """A model on the GPU in bf16, int8 or int4."""
    with torch.device("meta"):
        model = Gemma2(config)
        if weights in BITS:
            use_packed_layers(model, Scheme(BITS[weights]))
        else:
            model.to(torch.bfloat16)
    model.to_empty(device="cuda").eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.weight.random_(0, 256)
            module.scale.fill_(DEVIATION / (74 if module.bits == 8 else 4.6))  # of whole numbers drawn evenly
            if module.zero is not None:
                module.zero.fill_(8)
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            norm = module.weight.ndim == 1
            module.weight.zero_() if norm else module.weight.normal_(std=DEVIATION)
    return model


def seconds(action: Callable[[], Any], rounds: int = 3) -> float:
    """Median of some runs after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def ours(config: Gemma2Config, weights: str, tokens: int, rounds: int) -> tuple[Measured, float]:
    """What `cabochon bench` measures, and the seconds of a prefill of 4096 tokens."""
    model = random_model(config, weights)
    measured = measure(model, prompt=512, tokens=tokens, streams=(1, 16, 64), rounds=rounds)
    long = measure(model, prompt=4096, tokens=4, streams=(1,), rounds=2)
    return measured, long.first_token_seconds


@torch.inference_mode()
def theirs(config: Gemma2Config, tokens: int) -> dict[str, float]:
    """Seconds of transformers: prefill of 512 and of 4096 tokens, and a decoded token behind 512."""
    from transformers import Gemma2Config as TheirConfig
    from transformers import Gemma2ForCausalLM

    settings = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    wanted = TheirConfig(**settings, attn_implementation="eager", dtype="bfloat16")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Gemma2ForCausalLM(wanted).eval()
        torch.set_default_dtype(torch.float32)
    found = {}
    for length in (512, 4096):
        ids = torch.randint(4, config.vocab_size, (1, length), device="cuda")
        found[f"prefill {length}"] = seconds(lambda ids=ids: model(ids, use_cache=True, logits_to_keep=1))
    ids = torch.randint(4, config.vocab_size, (1, 512), device="cuda")
    state = model(ids, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        token, cache = state.logits[:, -1:].argmax(-1), state.past_key_values
        for _ in range(tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            int(token)  # whoever streams an answer reads each token

    found["decode"] = seconds(decode, rounds=1) / tokens
    return found


def report(size: str, weights: str, measured: Measured, long: float, peer: dict[str, float]) -> dict[str, Any]:
    """Print a row for each figure; returns them."""
    rows: dict[str, Any] = {
        "prefill 512": 512 / measured.first_token_seconds,
        "prefill 4096": 4096 / long,
        **{f"decode {d.streams}": d.tokens_per_second for d in measured.decode},
    }
    shares = {f"decode {d.streams}": d.share_of_bandwidth for d in measured.decode}
    for name, rate in rows.items():
        line = f"{size} {weights:<5} {name:<13} {rate:10,.1f} tokens/s"
        if name in shares:
            line += f"   {shares[name]:5.1%} of {measured.bandwidth / 1e9:,.0f} GB/s"
        their = peer.get(name.removesuffix(" 1"))
        if their:
            count = 1 if name.startswith("decode") else int(name.split()[1])
            line += f"   {rate * their / count:5.2f} x transformers ({count / their:,.1f})"
        print(line, flush=True)
    told = {"size": size, "weights": weights, "gpu": measured.gpu, "bandwidth": measured.bandwidth}
    return {**told, "weights_bytes": measured.weights_bytes, "rates": rows, "shares": shares, "peer": peer}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["2b", "9b"])
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    figures = []
    for size in options.sizes:
        config = Gemma2Config.preset(size)
        peer: dict[str, float] = {}
        if not options.without_peer:
            peer = theirs(config, 20)
            gc.collect()
            torch.cuda.empty_cache()
        for weights in options.weights:
            torch.cuda.reset_peak_memory_stats()
            figures.append(report(size, weights, *ours(config, weights, options.tokens, options.rounds), peer))
            gc.collect()
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
