"""Episodes of reinforcement learning kept for a person to read: `episodes.jsonl`, a line an episode, token by token.

Per token stand what moved the policy: its share of the KL to the reference (log pi - log pi_ref), the value the value
function gave the state before it (PPO alone), and the advantage it was trained with (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fledge.rl.world import Round
from fledge.text.tokenizer import StreamDecoder, Tokenizer
from fledge.train.metrics import JsonLines


def episode_lines(done: Round, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first `count` episodes of a round. `values` is empty where there is no value function; a reward that could
    not be had is a score of None, and its advantages are 0."""
    rollout, lines = done.rollout, []
    has_values = bool(rollout.old_values_BT.any())
    for row in range(min(count, len(done.prompts))):
        ids = done.completions[row].ids
        width = rollout.tokens_BT.shape[1]
        # The answer stands right of the prompt's fixed width; one without a reward has no action, but was said.
        start = _answer_start(rollout.segments_BT[row], len(done.prompts[row]))
        said = slice(start, min(start + len(ids), width))
        kl_T = rollout.old_logprobs_BT[row] - rollout.reference_logprobs_BT[row]
        score = float(rollout.scores_B[row])
        tokens = rollout.tokens_BT[row][said].tolist()
        lines.append(
            {
                "prompt": tokenizer.decode(list(done.prompts[row])),
                "answer": done.completions[row].text,
                "ended": done.completions[row].finish_reason == "stop",
                "score": score if score == score else None,
                "tokens": tokens,
                "pieces": pieces(tokens, tokenizer),
                "kl": _rounded(kl_T[said]),
                "values": _rounded(rollout.old_values_BT[row][said]) if has_values else [],
                "advantages": _rounded(rollout.advantages_BT[row][said]),
            }
        )
    return lines


def keep_episodes(log: JsonLines, where: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines of a round; `where` says of which stage and step they are."""
    for line in lines:
        log.write({**where, **line})


def pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; where several make up one character (a Chinese one, say) the last of them has it and the
    others have none. Special tokens stand by their name."""
    found: list[str] = []
    stream = StreamDecoder(tokenizer)
    for token in tokens:
        if token in tokenizer.special_ids:
            found.append(stream.flush() + tokenizer.pieces([token])[0])
        else:
            found.append(stream.push(token))
    if found and (left := stream.flush()):
        found[-1] += left
    return found


def _answer_start(segments_T: Tensor, prompt_length: int) -> int:
    """Prompts are padded on the left, so the first real position is where one begins."""
    return int(segments_T.ne(0).int().argmax()) + prompt_length


def _rounded(values_T: Tensor) -> list[float]:
    return [round(value, 6) for value in values_T.tolist()]
