"""What a request may say, field by field: OpenAI's names, strict types, no field that would be ignored in silence."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=4_000_000)]
# A list ends at its first error: of a million, each would become a record of its own.
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=1_000_000)]
Texts = Annotated[list[Text], Field(fail_fast=True, max_length=4096)]
SeveralIds = Annotated[list[Ids], Field(fail_fast=True, max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=1024)]
Temperature = Annotated[float, Field(ge=0, le=100)]
_MAX_BIASES, _MAX_FIELDS = 1024, 256


def _few(value: Any) -> Any:
    """Counted before each is looked at."""
    if isinstance(value, dict) and len(value) > _MAX_BIASES:
        raise ValueError(f"at most {_MAX_BIASES} entries")
    return value


class Strict(BaseModel):
    """No conversions, no unknown fields, no infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _not_many(cls, value: Any) -> Any:
        """Each field that is unknown would be an error of its own."""
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"at most {_MAX_FIELDS} fields")
        return value


class Lenient(BaseModel):
    """The same for what clients send back as they got it: fields that mean nothing here are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding against watchers of the network: none is sent


class Common(Strict):
    """What all kinds of answers have in common."""

    model: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(_few),
        ]
        | None
    ) = None
    # Beyond OpenAI
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    regex: Annotated[str, Field(max_length=4096)] | None = None
    choice: Choice | None = None
    # Notes of the caller, without effect on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(Lenient):
    """A part of a message's content."""

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None


class CalledFunction(Lenient):
    """What the assistant called."""

    name: str
    arguments: str


class ToolCall(Lenient):
    """A call of the assistant."""

    id: str | None = None
    function: CalledFunction


class ChatMessage(Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    """The function in `tool_choice`."""

    name: Name


class ToolChoice(Strict):
    """`tool_choice` where it names a function."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Strict):
    """`response_format.json_schema`. (Its field is called `schema`, a name that pydantic keeps for itself.)"""

    name: Name
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format`. `value` is a schema for `json_object`, as text-generation-inference and its client have it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    value: dict[str, Any] | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # an answer has one call at most


class CompletionRequest(Common):
    """POST /v1/completions"""

    prompt: Text | Texts | Ids | SeveralIds
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: Text | Texts | Ids | SeveralIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31)] | None = None
    user: str | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation as it would be sent to the model."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Ids
    skip_special_tokens: bool = True
