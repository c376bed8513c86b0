"""Train a Gemma 2 from nothing on text that this script makes: a model that counts, in under a minute.

To run it:

    .venv/bin/python examples/train.py [STEPS]
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

import cabochon
from cabochon.data.format import text_example
from cabochon.data.pack import pack
from cabochon.train.config import TrainConfig
from cabochon.train.loop import Progress, train


def counting(seed: int) -> Iterator[str]:
    """Endless lines such as "37 38 39 40 41 42 43 44"."""
    draw = random.Random(seed)
    while True:
        first = draw.randrange(90)
        yield " ".join(str(first + i) for i in range(8))


def show(progress: Progress) -> None:
    print(f"step {progress.step:>4}  loss {progress.loss:.3f}  {progress.tokens_per_second:,.0f} tokens/s")


def main(steps: int = 120) -> None:
    tokenizer = cabochon.load().text_tokenizer
    # The tiny preset, smaller still: caps, window and grouped heads stay.
    config = replace(cabochon.Gemma2Config.preset("tiny"), hidden_size=64, num_layers=2, intermediate_size=128)
    torch.manual_seed(1)
    model = cabochon.Gemma2(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # norms start at zero, that is at a factor of one
            torch.nn.init.normal_(parameter, std=0.02)
    settings = TrainConfig(steps=steps, rows=8, length=64, warmup_steps=5, log_every=max(1, steps // 6))
    batches = pack((text_example(tokenizer, text) for text in counting(1)), settings.rows, settings.length, split=True)
    train(model, batches, settings, show)
    lm = cabochon.LM(model, tokenizer)
    print("61 62 63" + lm.generate("61 62 63", max_new_tokens=20).text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
