"""The plan of a ring: one frozen value that decides everything a run does, written to plan.json before any work.

A recipe (pocket.py, fledgling.py) is a function that returns one; `--set a.b=c` replaces leaves; nothing else steers
a run. The one dial is `depth`: `scale_of` derives width, heads, batch, learning rates and token budget from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fledge.config import check_range
from fledge.data.filters import FilterConfig
from fledge.data.fim import FimConfig
from fledge.rl.ppo import PPOConfig
from fledge.text.tokenizer import TokenizerConfig
from fledge.train.optim import OptimConfig

SMALLEST = 1e-12  # of what must be positive
MAX_SEED = 2**31  # stages add to it, and shuffle, sample and initialise by what comes out
# The sources that the user's folder becomes: program code goes the way of code, all else that of prose and chats.
USER_TEXT, USER_CODE = "user", "user-code"


@dataclass(frozen=True)
class CorpusPlan:
    """What is read. Names are those of `fledge data list`; `text` is the user's own folder.

    `text_hash` stands for the folder's content, so that a changed folder is a changed plan.
    """

    prose: tuple[str, ...]
    code: tuple[str, ...]
    chats: tuple[str, ...]
    text: str | None = None
    text_hash: str | None = None
    limits: dict[str, int] = field(default_factory=dict)  # bytes read of a source, by its name; others whole
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True)
class FitPlan:
    """One training stage by gradient. `steps` of `rows` rows of `row_length` positions.

    `warmup` and `cooldown` are shares of the steps; `optim` holds one rule a parameter role. A step is cut into
    `lanes` micro-batches, which run side by side where the cores are there for it (train/lanes.py).
    """

    steps: int
    rows: int
    row_length: int
    optim: OptimConfig
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.02
    cooldown: float = 0.6
    final: float = 0.0
    clip_norm: float | None = None
    lanes: int = 1

    def __post_init__(self) -> None:
        check_range(self, "steps rows row_length lanes", 1)
        check_range(self, "warmup cooldown final", 0, 1)
        check_range(self, "clip_norm", SMALLEST)

    @property
    def tokens(self) -> int:
        """Positions seen, padding included."""
        return self.steps * self.rows * self.row_length

    @property
    def warmup_steps(self) -> int:
        return min(self.steps, round(self.warmup * self.steps))


@dataclass(frozen=True)
class PretrainPlan:
    """`epochs` passes over the prose; with `reset_tables` the n-gram tables forget before each (models/pocket.py).

    `code_share` mixes code in from the first token, as GPT-3.5's base did; 0 leaves it to the code stage.
    """

    fit: FitPlan
    reset_tables: bool = True
    code_share: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "code_share", 0, 1)


@dataclass(frozen=True)
class CodePlan:
    """Continued training on `code_share` code and the rest prose; `fim` says which code is rearranged."""

    fit: FitPlan
    code_share: float = 0.7
    fim: FimConfig = field(default_factory=FimConfig)

    def __post_init__(self) -> None:
        check_range(self, "code_share", 0, 1)


@dataclass(frozen=True)
class SFTPlan:
    """Imitation of the human chats. `prose_share` of the rows are pretraining text."""

    fit: FitPlan
    prose_share: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "prose_share", 0, 1)


@dataclass(frozen=True)
class RankingPlan:
    """How `pocket` gets rankings without labelers: the human reply over SFT samples over base samples.

    `prompts` for the reward model and as many others for the gold judge; K is 1 + sft_samples + base_samples.
    """

    prompts: int
    held_out: int = 96
    sft_samples: int = 3
    base_samples: int = 2
    batch: int = 64

    def __post_init__(self) -> None:
        check_range(self, "prompts held_out batch", 1)
        check_range(self, "sft_samples base_samples", 0)
        if not 4 <= self.completions <= 9:
            raise ValueError(f"a ranking has 4 to 9 answers (Ouyang et al. 2022, section 3.4), got {self.completions}")

    @property
    def completions(self) -> int:
        """K: the human reply and all samples."""
        return 1 + self.sft_samples + self.base_samples


@dataclass(frozen=True)
class RewardPlan:
    """K-wise ranking on the SFT trunk. One epoch: more overfits (Ouyang et al. 2022, section 3.4)."""

    prompts_per_step: int
    optim: OptimConfig
    epochs: int = 1
    warmup: float = 0.05
    final: float = 0.1
    clip_norm: float | None = 1.0
    lanes: int = 1

    def __post_init__(self) -> None:
        check_range(self, "prompts_per_step epochs lanes", 1)
        check_range(self, "warmup final", 0, 1)
        check_range(self, "clip_norm", SMALLEST)


@dataclass(frozen=True)
class EvaluationPlan:
    """Held-out measurements. `orders` are those of the Kneser-Ney models that language quality is held against."""

    prompts: int = 192
    prompts_shown: int = 6
    orders: tuple[int, ...] = (2, 3, 5)
    resamples: int = 10_000
    benchmarks: tuple[str, ...] = ()  # multiple choice; fetched when the stage runs
    shots: tuple[int, ...] = (0, 1, 5)
    benchmark_limit: int | None = None  # questions of each

    def __post_init__(self) -> None:
        check_range(self, "prompts resamples benchmark_limit", 1)
        check_range(self, "prompts_shown", 0)
        if not self.orders or min(self.orders) < 1:
            raise ValueError(f"orders are {list(self.orders)}: expected at least one, each 1 or more")
        if not self.shots or min(self.shots) < 0:
            raise ValueError(f"shots are {list(self.shots)}: expected at least one, each 0 or more")


@dataclass(frozen=True)
class RingPlan:
    """A whole run. `model` is the config of `family` without its vocabulary, which the tokenizer decides."""

    recipe: str
    depth: int
    seed: int
    family: str
    model: dict[str, Any]
    corpus: CorpusPlan
    tokenizer: TokenizerConfig
    pretrain: PretrainPlan
    code: CodePlan
    sft: SFTPlan
    rankings: RankingPlan
    reward: RewardPlan
    ppo: PPOConfig
    evaluation: EvaluationPlan
    control: bool = False  # a second PPO without the pretraining mix, to see what the mix is worth
    compile: bool | None = None  # None: where a C++ compiler is there and the stage is long enough to pay
    save_seconds: float = 45.0  # how often a stage saves its state

    def __post_init__(self) -> None:
        check_range(self, "seed", 0, MAX_SEED)
        check_range(self, "save_seconds", 0)


@dataclass(frozen=True)
class Scale:
    """What the dial decides; see `scale_of`."""

    width: int
    num_heads: int
    row_length: int
    rows: int
    tokens: int
    lr: float


# Pocket's measured point, from which the other depths follow: depth 4 on two CPU cores (docs/pretraining.md).
REFERENCE_DEPTH, REFERENCE_ROWS, REFERENCE_TOKENS = 4, 16, 3_500_000


def scale_of(depth: int) -> Scale:
    """Width, heads, rows, tokens and rates of a model of `depth` layers.

    Width is 32 x depth, in heads of 64 (Kaplan et al. 2020, figure 5: loss is flat in the aspect ratio). Tokens grow
    with the trunk's parameters (Hoffmann et al. 2022: in equal proportion). Rows a step grow with tokens^0.38
    (Bergsma et al. 2025, "Power Lines": the critical batch as a power of the data). All rates fall with 1/sqrt(width),
    as those of Adam's embeddings and head do in nanochat; the trial that fixed them was 128 wide.
    """
    num_heads = max(1, -(-32 * depth // 64))
    width = 64 * num_heads
    growth = (width / 128) ** 2 * depth / REFERENCE_DEPTH
    row_length = 128 if depth <= 4 else 256 if depth <= 8 else 512
    tokens = max(1_000_000, round(REFERENCE_TOKENS * growth))
    return Scale(width, num_heads, row_length, max(1, _rows(growth) * 128 // row_length), tokens, (128 / width) ** 0.5)


def _rows(growth: float) -> int:
    """Rows of 128 a step: the power of two nearest to 16 x growth^0.38, at least 8."""
    target = REFERENCE_ROWS * growth**0.38
    power = 8
    while power * 2**0.5 < target:
        power *= 2
    return power
