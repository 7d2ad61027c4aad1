"""Base class of the rewards that ask a multimodal language model: requests, retries, and invalid answers.

The model runs on any server with OpenAI's chat completions API (vLLM, sglang, ...).
"""

import re
import string
import sys
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from ...config import Section
from ...utils.errors import BadInput, RunFailed
from ..base import Reward
from .http import Refused, RetryPolicy, Unusable, ask, ask_all, check_url, to_png

RETRY_TEMPERATURE = 0.7
"""Sampling temperature of retries. The first attempt is greedy, so repeating it would give the same answer."""
PER_REQUEST = (400, 413, 422)
"""Status codes that may be caused by a single request, such as a prompt that is too long."""


class ChatOptions(Section):
    """Options of the server and the question."""

    fills: ClassVar[tuple[str, ...]] = ("prompt",)
    """Names of the placeholders that the instruction may contain."""

    url: str = Field("http://127.0.0.1:8000/v1", description="Base URL of the server's API, which ends in /v1.")
    model: str = Field("", max_length=300, description="Name of the model on the server.")
    image_size: Annotated[int, Field(ge=32, le=4096)] = Field(
        512, description="Longest side in pixels to which images are scaled down before they are sent."
    )
    parallel: Annotated[int, Field(ge=1, le=256)] = Field(8, description="Number of concurrent requests.")
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
        120.0, description="Timeout of one attempt in seconds, from connecting to the end of the answer."
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="Further attempts if there is no valid answer, each with another seed."
    )
    instruction: str = Field("", description="The question.")

    @field_validator("instruction")
    @classmethod
    def _fillable(cls, text: str) -> str:
        try:
            fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"instruction cannot be filled in: {error}") from error
        names = {name for _, name, _, _ in fields}
        if any(shape not in ("", "g") or turn for _, _, shape, turn in fields):
            raise ValueError("instruction may use no other format than :g")
        if names - set(cls.fills) or "prompt" not in names:
            known = ", ".join(f"{{{name}}}" for name in cls.fills)
            found = ", ".join(sorted(names)) or "none"
            raise ValueError(f"instruction has the placeholders {found}: use {{prompt}}, and none other than {known}")
        return text


class ChatReward(Reward):
    """Asks a multimodal language model one question about one or two images."""

    typical_range = (0.0, 1.0)
    remote = True
    settings: ClassVar[dict[str, Any]]
    """Further fields of a request, besides model and messages."""

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        check_url(self.options.url, self.name)
        if not self.options.model:
            raise BadInput(f"reward {self.name!r}: model is empty: enter the name of the model on the server")

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(self.options.timeout, self.options.retries)

    def load(self) -> None:
        """Check that the server has the model.

        Raises:
            BadInput: the server is unreachable, or does not have the model.
        """
        url = f"{self.options.url.rstrip('/')}/models"
        try:
            names = ask(url, None, self.retry_policy, _model_names)
        except RunFailed as error:
            raise BadInput(f"reward {self.name!r}: {error}") from error
        if self.options.model not in names:
            found = ", ".join(name[:60] for name in names[:10]) or "none"
            raise BadInput(f"reward {self.name!r}: {url} does not list model {self.options.model!r}; it has {found}")

    def ask_all(self, questions: list[tuple[list[str], str]], read: Callable[[dict], float]) -> list[float]:
        """A number per question; NaN with a warning if the model gives no valid answer.

        Args:
            questions: PNG images in base64, and the text, of each question.
            read: parses the answer's first choice; raises ValueError, KeyError, TypeError or IndexError if it is
                invalid.

        Raises:
            RunFailed: the server is unreachable, or refuses every question.
        """
        answers = ask_all(
            f"{self.options.url.rstrip('/')}/chat/completions",
            [self._body(images, text) for images, text in questions],
            self.retry_policy,
            lambda answer: read(answer["choices"][0]),
            self.options.parallel,
        )
        failed = [answer for answer in answers if isinstance(answer, Unusable | Refused)]
        refused = [answer for answer in failed if isinstance(answer, Refused)]
        fatal = [answer for answer in refused if answer.code not in PER_REQUEST]
        if fatal or (refused and len(refused) == len(answers)):
            raise (fatal or refused)[0]
        if failed:
            count = f"{len(failed)} of {len(answers)} questions"
            print(f"warning: reward {self.name!r} got no valid answer to {count}: {failed[0]}", file=sys.stderr)
        return [float("nan") if isinstance(answer, Unusable | Refused) else answer for answer in answers]

    def _body(self, images: list[str], text: str) -> Callable[[int], dict[str, Any]]:
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        fixed = {"model": self.options.model, "messages": [message], **self.settings}

        def body(unusable: int) -> dict[str, Any]:
            again = {"temperature": RETRY_TEMPERATURE, "seed": unusable}
            return {**fixed, **(again if unusable else {"temperature": 0})}

        return body

    def png(self, images: Tensor) -> list[str]:
        return to_png(images, self.options.image_size)


def answer_text(choice: dict) -> str:
    """The text of an answer without its reasoning and without Markdown formatting.

    Args:
        choice: its `message` has `content`, a string or a list of parts.

    Raises:
        ValueError: there is no text, or the answer was truncated within its reasoning.
    """
    content = choice["message"]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if not isinstance(content, str):
        raise ValueError("the answer has no text")
    text = content.rpartition("</think>")[2]  # some servers leave out the opening tag
    if "<think>" in text:
        raise ValueError("the answer ends within its reasoning")
    return re.sub(r"[*_`#\"]", "", text)


def _model_names(answer: Any) -> list[str]:
    return [str(entry["id"]) for entry in answer["data"]]
