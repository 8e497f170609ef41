"""What the human chats are cut into: disjoint parts for each stage, windows to imitate, prompts with human replies.

A conversation belongs to one part by the hash of its text, so that no stage ever sees a prompt of another: the reward
model, the gold judge and PPO each ask about conversations that SFT did not imitate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fledge.data.filters import document_key, example_text
from fledge.text.chat import Renderer
from fledge.types import ChatExample, Conversation, Provenance

# Shares of the training conversations, in InstructGPT's order of magnitude: PPO prompts cost nothing but variety.
SHARES = {"sft": 0.55, "reward": 0.175, "gold": 0.175, "ppo": 0.1}
CONTEXT_MESSAGES = (3, 1)  # how much of the conversation a prompt keeps, the longest that fits


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, as ids too, and what the human answered."""

    conversation: Conversation
    ids: tuple[int, ...]
    reply: str
    provenance: Provenance


def part_of(chat: ChatExample) -> str:
    """Which part a conversation belongs to; other bits of the hash than those that split off validation."""
    place = int.from_bytes(document_key(example_text(chat))[8:], "big") / 2.0**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "ppo"


def windows(conversation: Conversation, renderer: Renderer, max_tokens: int) -> list[Conversation]:
    """A `normalise`d conversation as consecutive stretches that begin with a user turn and fit `max_tokens`, none
    overlapping.

    A single exchange that does not fit is kept whole; `conversation_piece` decides what of it can be learned.
    """
    stretches: list[list[Conversation]] = []
    for exchange in _exchanges(conversation):
        held = stretches[-1] if stretches else None
        if held is not None and len(renderer.render(_joined([*held, exchange])).ids) <= max_tokens:
            held.append(exchange)
        else:
            stretches.append([exchange])
    return [_joined(stretch) for stretch in stretches]


def prompts(
    chats: Sequence[ChatExample], renderer: Renderer, *, count: int, max_tokens: int, seed: int
) -> list[Prompt]:
    """Up to `count` prompts from different places of different conversations, in a seeded order.

    Every conversation gives one prompt before any gives a second.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(chats))
    chosen: list[Prompt] = []
    places = {int(index): rng.permutation(_reply_places(chats[index].conversation)).tolist() for index in order}
    while len(chosen) < count and any(places.values()):
        for index in order:
            left = places[int(index)]
            found = None
            while left and found is None:
                found = _prompt(chats[index], left.pop(), renderer, max_tokens)
            chosen += [found] if found is not None else []
    return chosen[:count]


def _reply_places(conversation: Conversation) -> list[int]:
    """Indices of assistant messages that follow a user message."""
    messages = conversation.messages
    return [
        i
        for i in range(1, len(messages))
        if messages[i].role == "assistant" and messages[i - 1].role == "user" and messages[i].text.strip()
    ]


def _prompt(chat: ChatExample, place: int, renderer: Renderer, max_tokens: int) -> Prompt | None:
    for length in CONTEXT_MESSAGES:
        if place - length < 0:
            continue
        conversation = Conversation(chat.conversation.messages[place - length : place])
        ids = renderer.prompt(conversation)
        if conversation.messages[0].role == "user" and len(ids) <= max_tokens:
            return Prompt(conversation, tuple(ids), chat.conversation.messages[place].text, chat.provenance)
    return None


def _exchanges(conversation: Conversation) -> list[Conversation]:
    """Stretches that each begin with a user message (the first may begin with the system's)."""
    starts = [i for i, message in enumerate(conversation.messages) if message.role == "user"]
    if not starts:
        return []
    bounds = [0, *starts[1:], len(conversation.messages)]
    return [Conversation(conversation.messages[a:b]) for a, b in pairwise(bounds)]


def _joined(stretch: Sequence[Conversation]) -> Conversation:
    return Conversation(tuple(message for part in stretch for message in part.messages))
