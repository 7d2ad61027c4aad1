"""The reward `mllm-yes`: the probability that a multimodal language model answers yes."""

import math

import torch
from pydantic import Field
from torch import Tensor

from .http import number
from .mllm import ChatOptions, ChatReward


class MllmYes(ChatReward):
    """P(yes) / (P(yes) + P(no)) of the first token of a multimodal language model's answer.

    The score is continuous, so equal scores are rare. The server must return log-probabilities. If neither yes nor no
    is among the most likely first tokens, the image has no score: its sample is dropped and counted.
    """

    name = "mllm-yes"
    settings = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}

    class Options(ChatOptions):
        instruction: str = Field(
            'Does this image show "{prompt}", and is it free of visible faults? Answer with one word, yes or no.',
            max_length=20_000,
            description="The question; {prompt} is filled in.",
        )

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        texts = [self.options.instruction.format(prompt=prompt) for prompt in prompts]
        questions = [([image], text) for image, text in zip(self.png(images), texts, strict=True)]
        return torch.tensor(self.ask_all(questions, probability), dtype=torch.float32)


def probability(choice: dict) -> float:
    """P(yes) against P(no) of the first token.

    Raises:
        ValueError: neither is among the most likely tokens.
    """
    found = {"yes": 0.0, "no": 0.0}
    for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
        word = str(entry["token"]).strip().lower()
        if word in found:
            found[word] += math.exp(min(number(entry["logprob"]), 0.0))
    total = sum(found.values())
    if total <= 0:
        raise ValueError("neither yes nor no is among the most likely first tokens")
    return found["yes"] / total
