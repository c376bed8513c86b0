"""Multiple choice without generating a word: which ending does the model find likeliest?

To run it:

    .venv/bin/python examples/score.py
"""

import math

import cabochon

PROMPT = "The capital of France is"
ENDINGS = (" Rome.", " Paris.", " Madrid.", " Berlin.")


def main() -> None:
    lm = cabochon.load()
    scores = {ending: lm.score(PROMPT, ending) for ending in ENDINGS}
    total = sum(math.exp(score.logprob) for score in scores.values())
    for ending, score in scores.items():
        share = math.exp(score.logprob) / total
        greedy = "what greedy decoding would say" if score.is_greedy else ""
        print(f"{PROMPT}{ending:<10} {score.logprob:7.2f} nats in {score.tokens} tokens {share:6.1%}  {greedy}")
    print("answer:", max(scores, key=lambda ending: scores[ending].logprob).strip())


if __name__ == "__main__":
    main()
