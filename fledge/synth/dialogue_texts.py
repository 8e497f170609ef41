"""A conversation as the text in which models are asked about it, and the phrases of critique, revision and judgement.

After Bai et al. 2022 (2212.08073), sections 3.1 and 4.1 and appendix C, in English and in Chinese. The same
conversation always gives the same text, so labels can be traced to what was asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from fledge.text.constitution import Language
from fledge.types import Conversation


@dataclass(frozen=True)
class Phrases:
    """The fixed phrases of one language. `first` and `second` are the continuations that are scored."""

    system: str
    user: str
    assistant: str
    tool: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str
    consider: str
    options: str
    think: str
    verdict: str
    breaks: str
    keeps: str
    rule: str
    reply: str
    yes: str
    no: str
    first: str = " (A)"
    second: str = " (B)"


ENGLISH = Phrases(
    system="System",
    user="Human",
    assistant="Assistant",
    tool="Tool",
    critique_request="Critique Request",
    critique="Critique",
    revision_request="Revision Request",
    revision="Revision",
    consider="Consider the following conversation between a human and an assistant:",
    options="Options:",
    think="Let's think step by step:",
    verdict="The better answer is",
    breaks="Does the assistant's last answer break this rule?",
    keeps="Does the assistant's last answer keep this rule?",
    rule="Rule",
    reply="Answer:",
    yes=" yes",
    no=" no",
)
CHINESE = Phrases(
    system="系统",
    user="用户",
    assistant="助手",
    tool="工具",
    critique_request="批评要求",
    critique="批评",
    revision_request="修改要求",
    revision="修改",
    consider="请看下面这段用户与助手的对话：",
    options="选项：",
    think="我们一步一步地想：",
    verdict="更好的回答是",
    breaks="助手的上一个回答违反了这条规则吗？",
    keeps="助手的上一个回答遵守了这条规则吗？",
    rule="规则",
    reply="回答：",
    yes="是",
    no="否",
)
PHRASES: dict[Language, Phrases] = {"en": ENGLISH, "zh": CHINESE}


def dialogue_text(conversation: Conversation, phrases: Phrases) -> str:
    """Paragraphs, each "Speaker: what was said"."""
    return "\n\n".join(f"{getattr(phrases, message.role)}: {message.text}" for message in conversation.messages)


def answer_prompt(prompt: Conversation, phrases: Phrases) -> str:
    """The conversation with the assistant's paragraph opened."""
    return f"{dialogue_text(prompt, phrases)}\n\n{phrases.assistant}:"


def next_speakers(phrases: Phrases) -> tuple[str, ...]:
    """What ends a paragraph of the model's: any other one begins."""
    names = ("user", "assistant", "system", "critique_request", "critique", "revision_request", "revision")
    return tuple(f"\n\n{getattr(phrases, name)}:" for name in names)
