"""Several answers to one question, repeatable, and how sure the model was of each token.

    .venv/bin/python examples/sample.py
"""

import math

import cabochon

QUESTION = "Tell me about the ocean."


def main() -> None:
    lm = cabochon.load()
    # One prompt, three answers side by side. The same seed gives the same three again.
    prompt = f"Question: {QUESTION}\nAnswer:"
    settings = {"n": 3, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 24, "stop": "\n"}
    answers = lm.generate(prompt, seed=7, **settings)
    for number, answer in enumerate(answers, start=1):
        print(f"{number}. {answer.text.strip()}  [{answer.finish_reason}]")
    again = lm.generate(prompt, seed=7, **settings)
    print("the same again:", [a.text for a in again] == [a.text for a in answers])

    # A greedy answer with the log-probability of each token, and the two likeliest at its place.
    greedy = lm.chat([{"role": "user", "content": QUESTION}], max_new_tokens=8, logprobs=2)
    for token in greedy.logprobs or []:
        tops = ", ".join(f"{spell(lm, i)} {math.exp(logprob):.0%}" for i, logprob in token.top)
        print(f"{spell(lm, token.token_id):>16} {math.exp(token.logprob):>4.0%}   likeliest: {tops}")


def spell(lm: cabochon.LM, token_id: int) -> str:
    """A token as text in quotes; control tokens show by their names."""
    return repr(lm.text_tokenizer.decode([token_id], skip_control=False))


if __name__ == "__main__":
    main()
