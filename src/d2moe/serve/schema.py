"""What clients may send: OpenAI's fields, and ours. Unknown fields are refused by name, as a typing error would do nothing."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from d2moe.types import BASE_BITS, MAX_BITS, QUALITIES, quality_bits

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20

Stop = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]


def width_of(bits: float | None, quality: str | None, default: float, *, routed: bool) -> float:
    """The average width that a request asks for. A model that is not `routed` has whole widths only, and a word of `quality`
    means the next one up. ConfigError if both are given."""
    if quality is None:
        return default if bits is None else bits
    wish = quality_bits(quality, bits)
    return wish if routed else math.ceil(wish)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Has no effect.")


class Common(Strict):
    """Fields of both kinds of completion."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MOST_CHOICES, description="Answers; answer i is drawn with seed + i.")
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same text.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = Field(False, description="Go on past the model's end of text.")
    bits: float | None = Field(
        None, ge=BASE_BITS, le=MAX_BITS, description="Average width of the experts; whole if the model has no width router."
    )
    quality: Literal["fast", "balanced", "best"] | None = Field(None, description=f"Instead of bits: {QUALITIES}.")
    grammar: str | None = Field(None, description="The answer follows this grammar, in llguidance's form of Lark.")
    regex: str | None = Field(None, description="The answer matches this regular expression.")
    user: str | None = Field(None, description="Has no effect.")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect.")


class CompletionRequest(Common):
    prompt: str | list[Token] | list[str] | list[list[Token]]
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    suffix: Literal[""] | None = Field(None, description="Not supported but empty.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Not supported but equal to n.")


class Part(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # In every message that the official client gives back; there is nothing here to put in them.
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None


class Function(Strict):
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the model's chat template.")
    store: bool | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")


class MemoryRequest(Strict):
    memory: str | int = Field(description='The whole process, as "6GB" or a number of bytes.')


class PolicyRequest(Strict):
    policy: str = Field(max_length=100, description="One of the policies of /admin/state.")


class DefaultsRequest(Strict):
    bits: float = Field(ge=BASE_BITS, le=MAX_BITS, description="Width of requests that name none.")


# Answers, for the description of the interface.


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: Problem


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens whose keys and values were there from earlier requests.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    bits: float = Field(description="Mean width of the experts that were used.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Null for part of a character.")


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int = Field(description="Tokens of prompt and answer together.")
    chat: bool = Field(description="Whether it has a chat template.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    running: int
    waiting: int
