"""Bugs in the one place where a conversation becomes tokens, text/chat.py."""

from __future__ import annotations

from mutant import Mutant

CHAT = "fledge/text/chat.py"

TEXT = (
    Mutant(
        "users-are-imitated",
        CHAT,
        'is_learned = message.role == "assistant" and message.is_learned',
        "is_learned = message.is_learned",
        "the loss covers what users say",
    ),
    Mutant(
        "context-is-learned",
        CHAT,
        'is_learned = message.role == "assistant" and message.is_learned',
        'is_learned = message.role == "assistant"',
        "answers that are only context are learned",
    ),
    Mutant(
        "end-not-learned",
        CHAT,
        "(False, *(is_learned for _ in text), is_learned)",
        "(False, *(is_learned for _ in text), False)",
        "the end of the assistant's turn is not learned",
    ),
    Mutant(
        "role-is-learned",
        CHAT,
        "(False, *(is_learned for _ in text), is_learned)",
        "(is_learned, *(is_learned for _ in text), is_learned)",
        "the loss covers the token that opens the assistant's turn",
    ),
    Mutant(
        "prompt-leaves-the-turn-closed",
        CHAT,
        'return (*self.render(conversation).ids, self.role_ids["assistant"])',
        "return self.render(conversation).ids",
        "the prompt does not open the assistant's turn",
    ),
    Mutant(
        "open-turn-is-closed",
        CHAT,
        "if not ended and conversation.messages:",
        "if not ended and not conversation.messages:",
        "an answer that ran out of tokens is rendered with an end",
    ),
    Mutant(
        "any-special-token-ends",
        CHAT,
        "has_ended = stop < len(ids) and ids[stop] == self.end_id",
        "has_ended = stop < len(ids)",
        "an answer that was cut off passes for one that ended",
    ),
    Mutant(
        "pad-may-be-the-end",
        CHAT,
        "used = (self.start_id, self.end_id, tokenizer.pad_id, *self.role_ids.values())",
        "used = (self.start_id, self.end_id, *self.role_ids.values())",
        "a template whose end is the padding token is accepted",
    ),
    Mutant(
        "end-of-text-does-not-stop",
        CHAT,
        "self.stop_ids = frozenset((self.end_id, tokenizer.end_of_text_id))",
        "self.stop_ids = frozenset((self.end_id,))",
        "generation runs past the end of a document",
    ),
    Mutant(
        "one-hash-for-all-templates",
        CHAT,
        "self.hash = config_hash(template)",
        "self.hash = config_hash(ChatTemplate())",
        "another template passes for the one of training",
    ),
    Mutant(
        "system-message-dropped",
        CHAT,
        "kept = [*turns[:head], *turns[start:]]",
        "kept = turns[start:]",
        "a long conversation loses its system message",
    ),
    Mutant(
        "offsets-without-the-start",
        CHAT,
        "offsets = np.cumsum([1, *",
        "offsets = np.cumsum([0, *",
        "the start token is not counted when a conversation is cut to fit",
    ),
    Mutant(
        "newest-exchange-dropped",
        CHAT,
        "start = next((i for i in starts if offsets[i] - offsets[head] >= excess), starts[-1])",
        "start = next((i for i in starts if offsets[i] - offsets[head] > excess), starts[-1])",
        "a conversation that just fits loses an exchange",
    ),
    Mutant(
        "unanswered-question-learned",
        CHAT,
        'while messages and messages[-1].role != "assistant":',
        'while messages and messages[-1].role == "system":',
        "what comes after the last answer stays in the training data",
    ),
    Mutant(
        "tools-are-joined",
        CHAT,
        '("system", "user", "assistant")  # each tool',
        '("system", "user", "assistant", "tool")  # each tool',
        "answers of several tools become one message",
    ),
    Mutant(
        "learned-joins-unlearned",
        CHAT,
        "return (one.role, one.is_learned) == (other.role, other.is_learned)",
        "return one.role == other.role",
        "an answer that is context is learned with its neighbour",
    ),
    Mutant(
        "empty-row-kept",
        CHAT,
        "if not mask[1:].any():",
        "if not mask.any() and not len(mask):",
        "a conversation with nothing to learn becomes a row",
    ),
)
