"""Tokens that a request has cost, and how the published API tells them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Usage:
    """Tokens so far; a request of several prompts adds up. `cached` of `prompt` were found in the cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def to_chat(self) -> dict[str, object]:
        """As chat and plain completions tell it."""
        details = {"reasoning_tokens": 0, "audio_tokens": 0}
        details |= {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": details,
        }

    def to_response(self) -> dict[str, object]:
        """As `/v1/responses` tells it."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.completion,
        }
