"""What Inference Endpoints call where they run their own server: a class that `handler.py` beside a model names."""

from collections.abc import Mapping, Sequence
from typing import Any

from cabochon.base.errors import BadInput, CabochonError
from cabochon.lm import load

# Parameters of their pipelines that are fields of `SamplingParams`, under the same name.
_SAME = {"max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop"}
_WITHOUT_EFFECT = {"do_sample", "return_full_text"}  # seen to below


class EndpointHandler:
    """A model that answers one request at a time. `path` is its folder."""

    def __init__(self, path: str = "/repository") -> None:
        self._lm = load(path)

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, str]]:
        """Answers {"inputs": ..., "parameters": {...}}: a text is continued, several are, a conversation is answered.

        A conversation is a list of {"role", "content"}; roles are user and assistant in turn. Without `do_sample`, a
        temperature or the like, the likeliest token is taken each time.

        Raises `ValueError`, from which their server makes an answer with status 400.
        """
        given = data if isinstance(data, Mapping) else {}
        inputs, parameters = given.get("inputs"), given.get("parameters") or {}
        try:
            sampling = _sampling(parameters)
            if _is_conversation(inputs):
                return [{"generated_text": self._lm.chat(list(inputs), **sampling).text}]  # type: ignore[arg-type]
            texts = [inputs] if isinstance(inputs, str) else inputs
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise BadInput("nothing to answer", "`inputs` is no text", "send {'inputs': 'a text'}")
            answers = self._lm.generate(texts, **sampling)
        except CabochonError as error:
            raise ValueError(f"{error.what}: {error.cause}; {error.hint}") from None
        except TypeError as error:  # a parameter of another type
            raise ValueError(f"`parameters` cannot be used: {error}") from None
        before = texts if parameters.get("return_full_text") else [""] * len(texts)
        return [{"generated_text": text + answer.text} for text, answer in zip(before, answers, strict=True)]


def _is_conversation(inputs: Any) -> bool:
    return isinstance(inputs, Sequence) and bool(inputs) and all(isinstance(one, Mapping) for one in inputs)


def _sampling(parameters: Any) -> dict[str, Any]:
    if not isinstance(parameters, Mapping):
        raise BadInput("`parameters` cannot be used", "they are no object", "send {'max_new_tokens': 100}")
    if unknown := set(parameters) - _SAME - _WITHOUT_EFFECT:
        name = sorted(map(str, unknown))[0]
        raise BadInput("`parameters` cannot be used", f"there is no {name}", f"known: {', '.join(sorted(_SAME))}")
    chosen = {name: value for name, value in parameters.items() if name in _SAME and value is not None}
    if isinstance(chosen.get("stop"), list):
        chosen["stop"] = tuple(chosen["stop"])
    drawn = parameters.get("do_sample") or any(name in chosen for name in ("top_k", "top_p"))
    return {"max_new_tokens": 100, **({"temperature": 1.0} if drawn else {}), **chosen}
