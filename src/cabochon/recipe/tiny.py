"""Make the model that ships inside, from nothing: corpus, tokenizer, pretraining, chat tuning, scores, card.

    python -m cabochon.recipe.tiny OUT [--work RUNS] [--threads N]

Every stage leaves a folder in the work folder and is skipped when its folder is there, so a build that was
killed goes on where it stopped. The corpus is the running Python's standard library and seeded grammars.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cabochon.base.files import atomic_folder
from cabochon.data import miniature
from cabochon.data.format import chat_example, text_example
from cabochon.data.pack import Batch, pack, stack
from cabochon.lm import load
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.recipe.card import write_card
from cabochon.recipe.score import score
from cabochon.recipe.tokenizer import build_tokenizer, save_tokenizer
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.config import TrainConfig
from cabochon.train.loop import Progress, train
from cabochon.weights.folder import load_model, save_model

SEED = 2408

# The stages in order. Most steps see short rows, which cost less; the last of the running text and all of the
# chat see rows longer than the window, so that global layers learn to look beyond it.
STAGES: dict[str, TrainConfig] = {
    "pretrain": TrainConfig(steps=600, rows=16, length=256, decay_share=0.3, final_share=0.4),
    "lengthen": TrainConfig(steps=40, rows=4, length=1024, learning_rate=1e-3, matrix_learning_rate=8e-3,
                            decay_share=0.0, warmup_steps=5),
    "chat": TrainConfig(steps=1500, rows=8, length=384, learning_rate=2e-3, matrix_learning_rate=1.5e-2,
                        decay_share=0.7),
    "polish": TrainConfig(steps=750, rows=8, length=384, learning_rate=2e-3, matrix_learning_rate=1.5e-2,
                          decay_share=0.9, final_share=0.01),
}  # fmt: skip
# Rows of running text in each batch of the last stages: without them the model forgets all that is not chat.
TEXT_ROWS = {"chat": 2, "polish": 1}
JOKES = {
    "chat": 0.21,
    "polish": 0.35,
    "names": 0.6,
}  # share of jokes among the chats: repeating any name is what is learned last


def build(out: Path, work: Path) -> None:
    """Run every stage that is not done yet, write the finished model folder to `out`, and score it."""
    tokenizer_folder = work / "tokenizer"
    if not tokenizer_folder.exists():
        _make_tokenizer(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    before: Path | None = None
    for name, config in STAGES.items():
        folder = work / name
        if not folder.exists():
            model = new_model() if before is None else load_model(before, dtype=torch.float32)
            _run_stage(name, config, model, tokenizer, work)
            save_model(model, folder)
        before = folder
    assert before is not None
    model = load_model(before, dtype=torch.float32).to(torch.bfloat16)
    files = {file.name: file.read_bytes() for file in tokenizer_folder.iterdir()}
    save_model(model, out, tokenizer_files=files, overwrite=True)
    print(f"wrote {out}; scoring it", file=sys.stderr)
    scores = score(load(out, device="cpu"))
    logs = {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES}
    write_card(out, SEED, STAGES, logs, scores)
    print(json.dumps({name: round(value, 4) for name, value in scores.items()}, indent=1))


def _make_tokenizer(folder: Path) -> None:
    texts = itertools.islice(miniature.pretraining_documents(SEED), 6000)
    chats = itertools.islice(miniature.conversations(SEED), 6000)
    chat_texts = ("\n".join(turn["content"] for turn in chat) for chat in chats)
    built = build_tokenizer(itertools.chain(texts, chat_texts), Gemma2Config.preset("tiny").vocab_size)
    with atomic_folder(folder) as unfinished:
        save_tokenizer(built, unfinished)


def new_model() -> Gemma2:
    """The tiny preset with seeded weights, float32."""
    torch.manual_seed(SEED)
    model = Gemma2(Gemma2Config.preset("tiny"))
    for name, p in model.named_parameters():
        if p.ndim == 2:  # norms start at zero, that is at a factor of one
            torch.nn.init.normal_(p, std=0.02 if name == "embedding.weight" else p.shape[1] ** -0.5)
    return model


def batches(stage: str, config: TrainConfig, tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """The endless data of a stage."""
    text_rows = TEXT_ROWS.get(stage, config.rows)
    texts = itertools.chain.from_iterable(miniature.pretraining_documents(s) for s in itertools.count(seed))
    pages = (text_example(tokenizer, text) for text in texts)
    text_batches = pack(pages, text_rows, config.length, split=True)
    if stage not in TEXT_ROWS:
        return text_batches
    talks = (chat_example(tokenizer, c) for c in miniature.conversations(seed, jokes_share=JOKES[stage]))
    return map(stack, pack(talks, config.rows - text_rows, config.length, split=False), text_batches)


def _run_stage(name: str, config: TrainConfig, model: Gemma2, tokenizer: Tokenizer, work: Path) -> None:
    started = time.perf_counter()

    def report(p: Progress) -> None:
        left = (config.steps - p.step) * config.rows * config.length / p.tokens_per_second / 60
        line = f"{name} {p.step}/{config.steps} loss {p.loss:.3f} {p.tokens_per_second:.0f} tokens/s"
        print(f"{line} {left:.0f} min left", file=sys.stderr, flush=True)
        last.append(p)

    last: list[Progress] = []
    train(model, batches(name, config, tokenizer, SEED + list(STAGES).index(name)), config, report)
    log = {
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "loss": round(last[-1].loss, 3),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (work / f"{name}.json").write_text(json.dumps(log))


def main() -> None:
    """Command line of `make tiny`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--shorten", type=float, default=1.0, help="share of the steps, to try the recipe quickly")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for name, config in STAGES.items():
        STAGES[name] = replace(config, steps=max(2, int(config.steps * options.shorten)))
    build(options.out, options.work)


if __name__ == "__main__":
    main()
