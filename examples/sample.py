"""Several answers to one prompt, repeatable, and how likely the model found each token.

To run it:

    .venv/bin/python examples/sample.py
"""

import math

import cabochon
from cabochon.text.chat import Message, encode_chat

# Anyone may be at the door, so there are many right answers to this.
JOKE: list[Message] = [
    {"role": "user", "content": "Tell me a joke."},
    {"role": "model", "content": "Knock knock."},
    {"role": "user", "content": "Who's there?"},
]


def main() -> None:
    lm = cabochon.load()
    # `generate` takes token ids as well as text, so a chat can have several answers side by side.
    prompt = encode_chat(lm.text_tokenizer, JOKE)
    settings = {"n": 5, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 8}
    answers = lm.generate(prompt, seed=7, **settings)
    for number, answer in enumerate(answers, start=1):
        print(f"{number}. {answer.text}  [{answer.finish_reason}]")
    again = lm.generate(prompt, seed=7, **settings)
    print("the same seed, the same answers:", [a.text for a in again] == [a.text for a in answers])

    # The greedy answer with the probability of each token, and the three likeliest at its place.
    greedy = lm.chat(JOKE, max_new_tokens=8, logprobs=3)
    for token in greedy.logprobs or []:
        tops = ", ".join(f"{spell(lm, i)} {math.exp(logprob):.0%}" for i, logprob in token.top)
        print(f"{spell(lm, token.token_id):>16} {math.exp(token.logprob):>4.0%}   likeliest: {tops}")


def spell(lm: cabochon.LM, token_id: int) -> str:
    """A token as text in quotes; control tokens show by their names."""
    return repr(lm.text_tokenizer.decode([token_id], skip_control=False))


if __name__ == "__main__":
    main()
