"""Text for CLIP models: tokens, and cached text embeddings."""

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def tokenizer(clean: str = "lower") -> Any:
    """CLIP's tokenizer; its vocabulary comes with open_clip.

    Args:
        clean: how a text is cleaned first. `lower`, `whitespace` and `canonicalize` are open_clip's (they repair broken
            Unicode and resolve HTML entities); `transformers` is the normalization of CLIPTokenizerFast.
    """
    from open_clip.tokenizer import SimpleTokenizer

    if clean != "transformers":
        return SimpleTokenizer(clean=clean)
    made = SimpleTokenizer()
    made.clean_fn = clean_as_transformers
    return made


def clean_as_transformers(text: str) -> str:
    """Normalize text as transformers' CLIP tokenizer does: NFC, single spaces, lower case."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()


class TextCache:
    """Text features, computed once per prompt and kept on the CPU.

    Args:
        encode: returns features `[N, D]` of N texts.
        limit: largest number of tokens that the network reads.
        count: returns the number of tokens of a text; prompts above `limit` are reported once.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], limit: int, count: Callable[[str], int]) -> None:
        self.encode, self.limit, self.count = encode, limit, count
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str], device: torch.device) -> Tensor:
        """Features `[B, D]` float32, without gradient."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for prompt in new:  # one by one, so that a score does not depend on the rest of the batch
            self._warn(prompt)
            with torch.no_grad():
                self.known[prompt] = self.encode([prompt])[0].float().cpu()
        return torch.stack([self.known[prompt] for prompt in prompts]).to(device)

    def _warn(self, prompt: str) -> None:
        if (count := self.count(prompt)) > self.limit:
            warn_truncated(prompt, count, self.limit)


def warn_truncated(prompt: str, count: int, limit: int) -> None:
    """Warn on stderr that a reward model truncates a prompt."""
    words = f"{count} tokens, of which the reward model reads {limit}"
    print(f"warning: the prompt {prompt[:60]!r} has {words}; the rest is ignored", file=sys.stderr)
