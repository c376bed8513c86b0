"""Save a model as a folder that transformers loads too, load it again, and see that it answers the same.

To run it:

    .venv/bin/python examples/save_and_reload.py [FOLDER]
"""

import sys
from pathlib import Path

import torch

import cabochon


def main(folder: str = "my-model") -> None:
    lm = cabochon.load(dtype="float32")
    lm.save(folder, overwrite=True)  # replaces an earlier model of that name, and nothing else
    for file in sorted(Path(folder).iterdir()):
        print(f"{file.stat().st_size:>12,}  {file.name}")

    again = cabochon.load(folder)
    ids = [lm.text_tokenizer.encode("What is 2 + 2?")]
    print("the same logits:", torch.equal(lm.logits(ids), again.logits(ids)))

    try:
        lm.save(folder)  # without overwrite nothing is ever replaced
    except cabochon.CabochonError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:2])
