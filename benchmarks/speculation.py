"""What guessing ahead gives and costs: an answer decoded plainly, then with guesses of which a known share is right.

    python benchmarks/speculation.py FOLDER --weights int8 --guesses 4

Run it on a machine that does nothing else. The model answers greedily first, so what comes next is known; a speculator
then guesses it with a given chance, token by token, and something else otherwise. Random weights do: only the share of
right guesses counts. The last line is the share above which guessing pays.
"""

import argparse
import random
import statistics
import time

import cabochon
from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.generate.speculate import Draft

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Oracle:
    """Guesses that are right with a chance, each on its own."""

    def __init__(self, answer: list[int], guesses: int, chance: float) -> None:
        self.answer, self.guesses, self.chance = answer, guesses, chance
        self.random = random.Random(0)

    def propose(self, request: Request, most: int) -> Draft:
        done = len(request.generated)
        known = self.answer[done : done + min(self.guesses, most)]
        return Draft(tuple(i if self.random.random() < self.chance else (i + 1) % 1000 for i in known))

    def release(self, request: Request) -> None:
        """Nothing is kept."""


def decode(lm: cabochon.LM, prompt: list[int], tokens: int, speculator: Oracle | None) -> tuple[float, list[int]]:
    """Tokens per second behind the prompt, and the answer."""
    engine = Engine(lm.model, frozenset(), EngineConfig(max_requests=1), speculator=speculator)
    request = engine.submit(prompt, SamplingParams(max_new_tokens=tokens))
    while not request.generated:
        engine.step()
    begun, first = time.perf_counter(), len(request.generated)
    while not request.done:
        engine.step()
    return (len(request.generated) - first) / (time.perf_counter() - begun), list(request.generated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    lm = cabochon.load(chosen.model, weights=chosen.weights)
    prompt = [random.Random(1).randrange(4, 1000) for _ in range(chosen.prompt)]
    _, answer = decode(lm, prompt, chosen.tokens, None)
    rates: dict[float | None, list[float]] = {share: [] for share in (None, *SHARES)}
    for _ in range(chosen.rounds):
        for share, found in rates.items():
            oracle = None if share is None else Oracle(answer, chosen.guesses, share)
            rate, said = decode(lm, prompt, chosen.tokens, oracle)
            assert said == answer or lm.model.embedding.weight.dtype.is_floating_point, "guesses changed the answer"
            found.append(rate)
    plain, *guessed = (statistics.median(found) for found in rates.values())
    print(f"plain: {plain:.1f} tokens/s")
    for share, rate in zip(SHARES, guessed, strict=True):
        print(f"{share:.0%} of guesses right: {rate:.1f} tokens/s, {rate / plain:.2f} x")
    pays = next((s for s, rate in zip(SHARES, guessed, strict=True) if rate > plain), None)
    print("guessing never pays" if pays is None else f"guessing pays from {pays:.0%} on")


if __name__ == "__main__":
    main()
