"""Talk to a model, line by line.

To run it:

    .venv/bin/python examples/chat.py            # the model inside
    .venv/bin/python examples/chat.py my-model   # a folder or a Hugging Face id
"""

import sys

import cabochon
from cabochon.text.chat import Message

LONGEST = 128  # tokens of an answer


def main(model: str | None = None) -> None:
    lm = cabochon.load(model)
    messages: list[Message] = []
    print("You begin. An empty line ends the chat.")
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line})
        while len(messages) > 1 and lm.count_chat(messages) + LONGEST > lm.context_length:
            del messages[:2]  # the oldest question and its answer
        stream = lm.stream_chat(messages, max_new_tokens=LONGEST)
        for piece in stream:
            print(piece, end="", flush=True)
        answer = stream.completion
        print(f"\n    {answer.usage.completion_tokens} tokens in {answer.usage.seconds:.2f} s, {answer.finish_reason}")
        messages.append({"role": "model", "content": answer.text})


if __name__ == "__main__":
    main(*sys.argv[1:2])
