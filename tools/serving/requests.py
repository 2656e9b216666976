"""What can be asked of tools.serve: the JSON bodies of OpenAI's API, as pydantic models.

An unknown key is refused by its name, and null is as good as nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from stories.constraints import NAMES, write_constraints
from tools.serving.scheduler import MAX_LENGTH

MAX_CHOICES = 8


def as_list(value):
    """A text alone is a list of one."""
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(as_list)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel, strict=True):
    """A JSON object."""

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value):
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if item is not None}
        return value


class StreamOptions(Body, extra="forbid"):
    include_usage: bool = False


class TextFormat(Body):
    type: Literal["text"]


class Neutral(Body):
    """What clients send unasked. These values change nothing; any other asks for what is not supported."""

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    logprobs: Literal[False, 0] = False
    top_logprobs: Literal[0] = 0
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: dict = Field({}, max_length=0)
    tools: list = Field([], max_length=0)
    tool_choice: Literal["none"] = "none"
    response_format: TextFormat | None = None


class StoryRequest(Neutral, extra="forbid"):
    """For /v1/completions."""

    model: str = ""  # any name: there is one model
    prompt: Texts = Field([""], min_length=1)  # how the story begins, or several stories
    words: Texts = []
    features: Texts = []
    summary: Texts = []
    sentence: Texts = []
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, ge=0.01, le=1)
    seed: int | None = None
    max_tokens: int = Field(MAX_LENGTH, ge=1)
    max_completion_tokens: int = Field(MAX_LENGTH, ge=1)
    stop: Texts = Field([], max_length=4)
    n: int = Field(1, ge=1, le=MAX_CHOICES)  # choices for each prompt
    best_of: int = Field(1, ge=1, le=MAX_CHOICES)  # stories, of which a choice is the best
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def instruction(self) -> str:
        """The constraints, one a line."""
        return write_constraints({name: "，".join(getattr(self, key)) for name, key in NAMES.items()})


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """Other keys are ignored: clients add names and ids."""

    role: str
    content: str | list[Part] = ""

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(StoryRequest):
    """For /v1/chat/completions."""

    messages: list[Message]

    def instruction(self) -> str:
        """The only message, and the constraints below it. Raises Refusal."""
        # Some clients always send a system message, if only an empty one.
        messages = [message for message in self.messages if message.role == "user" or message.text()]
        if len(messages) != 1 or messages[0].role != "user":
            raise Refusal(400, "Give one message of the user: no other turns, no system prompt.", "messages")
        return f"{messages[0].text()}\n{super().instruction()}".strip()


class Refusal(HTTPException):
    """What a visitor cannot have, and the key at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.param = param


def refusal_of(error: ValidationError) -> Refusal:
    """What is wrong first."""
    first = error.errors()[0]
    if not first["loc"]:
        return Refusal(400, f"The body must be a JSON object: {first['msg']}.")
    key = ".".join(map(str, first["loc"]))[:60]
    if first["type"] == "extra_forbidden" or first["loc"][0] in Neutral.model_fields:
        return Refusal(400, f"'{key}' is not supported here.", key)
    return Refusal(400, f"'{key}': {first['msg']}.", key)
