"""What clients of the OpenAI API send, checked, and the errors that they get: one line that names the field.

Fields are OpenAI's, and vLLM's own beside them. A field that is not known is ignored, as is null, which means the
default. What would change the answer and cannot be done here is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, from_json

from llava_jax.errors import reason_of, shortened
from llava_jax.fields import shown
from llava_jax.inference.requests import MOST_END_IDS, MOST_TOP_LOGPROBS
from llava_jax.inference.sampling import PENALTIES
from llava_jax.inputs.text import text_problem

MOST_MESSAGES = 1024
MOST_PICTURES = 16  # of one request
MOST_ANSWERS = 64  # of one request: its prompts times n
MOST_STOP = 16  # texts that end an answer
LONGEST_STOP = 256  # characters
MOST_CHOICES = 64  # answers to choose from
LONGEST_CHOICE = 1024  # characters
INT32, INT64 = 2**31 - 1, 2**63 - 1

# What the API has and this server has not: field → the values of it that change nothing.
NOT_HERE: dict[str, tuple] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "modalities": (["text"], []),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
STRUCTURES_NOT_HERE = ("json", "regex", "grammar", "json_object", "structural_tag")


# ---- errors


@dataclass(eq=False)
class ApiError(Exception):
    """What a client did wrong, or the server cannot do now, in OpenAI's form."""

    message: str  # one line, which may be shown to anybody
    status: int = 400
    param: str | None = None
    code: str | None = None
    type: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """The error of one field."""
    return ApiError(f"{param}: {message}", param=param, code=code)


def unavailable(message: str) -> ApiError:
    return ApiError(message, 503, type="server_error", code="service_unavailable")


# ---- the schema


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


Fields = TypeVar("Fields", bound=_Fields)


def _tagged(texts: str, others: str) -> Discriminator:
    """Which kind of a text-or-list a value is: errors then speak of that kind alone."""
    return Discriminator(lambda value: texts if isinstance(value, str) else others)


class ImageUrl(_Fields):
    url: str


class Part(_Fields):
    """One part of a message; what its type asks for is looked at when it is read."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


Parts = Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")]


class Message(_Fields):
    role: str
    content: Annotated[Parts, _tagged("<text>", "<list>")] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(_Fields):
    include_usage: bool | None = None


Choice = Annotated[str, Field(min_length=1, max_length=LONGEST_CHOICE)]


class StructuredOutputs(_Fields):
    choice: Annotated[list[Choice], Field(min_length=1, max_length=MOST_CHOICES)] | None = None


TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
StopTexts = Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=MOST_STOP), Tag("<list>")]


class Answering(_Fields):
    """How an answer is made, to a chat or to a text."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=INT32)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=PENALTIES[0], le=PENALTIES[1], allow_inf_nan=False)
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop: Annotated[StopTexts, _tagged("<text>", "<list>")] | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=MOST_END_IDS)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choice(self) -> list[str] | None:
        """Answers to choose from."""
        return self.structured_outputs.choice if self.structured_outputs else None

    @property
    def tells_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Answering):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def most_tokens(self) -> int | None:
        """None: all that is left of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def most_likely(self) -> int | None:
        """How many of the likeliest tokens are told of; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = (
    Annotated[str, Tag("<text>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS), Tag("<texts>")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_ANSWERS), Tag("<lists>")]
)


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "<text>"
    return "<ids>" if isinstance(first, int) else "<lists>" if isinstance(first, list) else "<texts>"


class CompletionRequest(Answering):
    prompt: Annotated[Texts, Discriminator(_kind_of_prompt)]
    max_tokens: int = Field(16, ge=1)  # OpenAI's own default here
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def most_tokens(self) -> int:
        return self.max_tokens

    @property
    def most_likely(self) -> int | None:
        return self.logprobs

    @property
    def several(self) -> bool:
        return isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or several, or their ids."""
        return list(self.prompt) if self.several else [self.prompt]  # type: ignore[arg-type,list-item]


AnyRequest = ChatRequest | CompletionRequest


# ---- a body → a request


def parse_chat(body: bytes) -> ChatRequest:
    """A request's body.

    Raises:
        ApiError: what is wrong with it.
    """
    request = _parsed(ChatRequest, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs", "needs logprobs to be true")
    _check(request, 1)
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """As `parse_chat`."""
    request = _parsed(CompletionRequest, body)
    _check(request, len(request.prompts))
    return request


def _parsed(kind: type[Fields], body: bytes) -> Fields:
    try:
        values = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {shortened(reason_of(error))}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(f"the body must be an object, and is {shortened(shown(values), 40)}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, harmless in NOT_HERE.items():
        if name in given and given[name] not in harmless:
            raise wrong(name, "is not supported here; leave it out", "unsupported_parameter")
    structures = given.get("structured_outputs")
    for name in STRUCTURES_NOT_HERE:
        if isinstance(structures, dict) and structures.get(name) is not None:
            raise wrong(f"structured_outputs.{name}", "only `choice` is supported", "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _first_of(error.errors(include_url=False, include_context=False), given) from None


def _first_of(errors: list[ErrorDetails], values: dict) -> ApiError:
    """The first problem that pydantic found, in OpenAI's words."""
    first = errors[0]
    param = ""
    for step in first["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("<"):  # a tag of ours
            param += f".{step}" if param else step
    if first["type"] == "missing":
        return ApiError(f"{param}: it is missing", param=param, code="missing_required_parameter")
    said = first["msg"].replace("Input should", "must").partition(" or instance of ")[0]
    value = first["input"]
    got = f", got {shortened(shown(value), 60)}" if isinstance(value, str | int | float | bool) else ""
    return wrong(param, f"{said[:1].lower()}{said[1:]}{got}", "invalid_value")


def _check(request: AnyRequest, prompts: int) -> None:
    """What one field alone does not say."""
    if request.n * prompts > MOST_ANSWERS:
        raise wrong("n", f"{prompts} prompts times n={request.n} are more than {MOST_ANSWERS} answers")
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "needs stream to be true")
    if request.most_tokens is not None and request.min_tokens > request.most_tokens:
        raise wrong("min_tokens", f"{request.min_tokens} are more than max_tokens={request.most_tokens}")
    if request.choice is None:
        return
    if request.n > 1:
        raise wrong("n", "structured_outputs.choice has one answer, the likeliest")
    if request.most_likely is not None:
        raise wrong("logprobs", "structured_outputs.choice tells of none")


def check_whole(text: str, param: str) -> str:
    """`text` itself; an error if it has half a character."""
    if problem := text_problem(text):
        raise wrong(param, problem)
    return text
