"""pocket: a small modern causal family, shaped by what learns most per second on two CPU cores.

A pre-norm transformer with rotary positions (Su et al. 2021, RoFormer), QK-norm (Henry et al. 2020), squared ReLU
(So et al. 2021, Primer) and zero-initialised output projections; value embeddings and a learned skip from the input
(both from the modded-nanogpt speedruns of 2024, after Zhou et al. 2024, "Value Residual Learning"); and two hashed
n-gram input tables (after Svenstrup et al. 2017, "Hash Embeddings"), which give a small trunk the knowledge of a
3-gram model for the price of two look-ups.

Everything that depends on token ids happens in `embed`; `hidden` sees a wider vector and takes it apart.
Shapes: B rows, T positions, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fledge.errors import ConfigError
from fledge.layers.attention import Context, RowContext
from fledge.layers.norms import rms_norm
from fledge.layers.rope import Rotation, frequencies, rotate, rotations

# Score scale on top of 1/sqrt(K): normalised queries and keys cannot grow, so the softmax needs help to become sharp.
# 1.5 from our trials; nanochat reaches 1.44 by multiplying both sides by 1.2.
QK_GAIN = 1.5
# Width per layer. Kaplan et al. 2020, figure 5: loss is flat in width/depth from about 30 upwards; the low end keeps
# the head, which costs vocabulary x width, small beside the trunk.
WIDTH_PER_LAYER = 32
HEAD_WIDTH = 64
# Multipliers of the n-gram hash: odd 32-bit constants of xxHash32 (Collet 2012). Ids below 2**20 keep sums in int64.
HASH_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


@dataclass(frozen=True)
class PocketConfig:
    """`table_rows` is the number of rows of each n-gram table; 0 leaves both out. `width` divides by `num_heads`."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    table_rows: int = 131_072
    rope_base: float = 1000.0
    mlp_ratio: int = 4
    max_positions: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.num_layers, self.num_heads, self.mlp_ratio)
        if min(sizes) < 1 or self.table_rows < 0:
            raise ConfigError(f"sizes must be positive, got {self}")
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width {self.width} must be num_heads {self.num_heads} times an even head width")
        if self.rope_base <= 0 or (self.max_positions is not None and self.max_positions < 1):
            raise ConfigError(f"rope_base and max_positions must be positive, got {self}")

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, table_rows: int = 131_072) -> PocketConfig:
        """The one dial: `depth` layers of 32 x depth channels, rounded up to whole heads of 64.

        Depth 4 is 128 wide with 2 heads, depth 6 is 192 with 3, depth 12 is 384 with 6 (origin: WIDTH_PER_LAYER).
        """
        if depth < 1:
            raise ConfigError(f"depth must be at least 1, got {depth}")
        num_heads = -(-WIDTH_PER_LAYER * depth // HEAD_WIDTH)
        return cls(vocab_size, num_heads * HEAD_WIDTH, depth, num_heads, table_rows)

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Attention(nn.Module):
    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        extra_BTD: Tensor | None,
        rotation: Rotation,
        site: int,
        context: Context,
    ) -> Tensor:
        shape = (*x_BTD.shape[:2], self.num_heads, x_BTD.shape[2] // self.num_heads)
        q_BTHK = rotate(norm(self.query(x_BTD).view(shape)), rotation)
        k_BTHK = rotate(norm(self.key(x_BTD).view(shape)), rotation)
        v_BTD = self.value(x_BTD)
        if extra_BTD is not None:
            v_BTD = v_BTD + extra_BTD
        scale = QK_GAIN / q_BTHK.shape[-1] ** 0.5
        y_BTHK = context.attend(site, q_BTHK, k_BTHK, v_BTD.view(shape), scale=scale)
        y_BTD: Tensor = self.out(y_BTHK.reshape(x_BTD.shape))
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # how much of the stream, how much of the input

    def forward(
        self,
        x_BTD: Tensor,
        input_BTD: Tensor,
        extra_BTD: Tensor | None,
        rotation: Rotation,
        site: int,
        context: Context,
    ) -> Tensor:
        x_BTD = self.mix[0] * x_BTD + self.mix[1] * input_BTD
        x_BTD = x_BTD + self.attention(norm(x_BTD), extra_BTD, rotation, site, context)
        mlp_BTD: Tensor = self.down(squared_relu(self.up(norm(x_BTD))))
        return x_BTD + mlp_BTD

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices uniform with variance 1/fan_in; those that write to the stream 0: a block starts as nothing."""
        for matrix in (self.attention.query, self.attention.key, self.attention.value, self.up):
            bound = (3 / matrix.in_features) ** 0.5
            nn.init.uniform_(matrix.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.down.weight)
        self.mix.copy_(torch.tensor([1.0, 0.0]))


class Pocket(nn.Module):
    """`Pocket(config)`, then `init_weights(generator)`. The n-gram tables give row-sparse gradients."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.first_values = nn.Embedding(config.vocab_size, config.width)
        self.last_values = nn.Embedding(config.vocab_size, config.width)
        num_tables = 2 if config.table_rows else 0
        self.tables = nn.ModuleList(
            nn.Embedding(config.table_rows, config.width, sparse=True) for _ in range(num_tables)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.width, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Token tables N(0, 1), head 0, blocks by `Block.init_weights`, n-gram rows by `reset_tables`."""
        for embedding in (self.tokens, self.first_values, self.last_values):
            nn.init.normal_(embedding.weight, generator=generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights(generator)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.reset_tables(generator)

    @torch.no_grad()
    def reset_tables(self, generator: torch.Generator) -> None:
        """Forget the n-gram rows, as before a new epoch: tables of this size learn an epoch by heart otherwise.

        In our trial three epochs with resets reached 1.394 bits per byte, without 1.591. The moments of the
        optimizer must be reset with them (`OptimizerSet.reset_role("table")`).
        """
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.02, generator=generator)

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """x_BT3D: the input and the value embeddings of the first and the last layer, side by side."""
        x_BTD: Tensor = self.tokens(tokens_BT)
        for length, table in enumerate(self.tables, start=2):
            x_BTD = x_BTD + table(self._hash(tokens_BT, length, context))
        return torch.cat((x_BTD, self.first_values(tokens_BT), self.last_values(tokens_BT)), dim=-1)

    def _hash(self, tokens_BT: Tensor, length: int, context: Context) -> Tensor:
        """Row of the table for the `length` tokens that end at each position, never looking past a document's start."""
        code_BT = tokens_BT * HASH_PRIMES[0]
        for steps in range(1, length):
            # vocab_size is no token's id, so the start of a document has rows of its own.
            code_BT = code_BT + context.earlier(tokens_BT, steps, self.vocab_size) * HASH_PRIMES[steps]
        return (code_BT ^ (code_BT >> 15)) % self.config.table_rows

    def hidden(self, x_BT3D: Tensor, context: Context) -> Tensor:
        """x_BTD, normalised and ready for `unembed`, from what `embed` returned."""
        x_BTD, first_BTD, last_BTD = x_BT3D.split(self.config.width, dim=-1)
        theta = frequencies(self.config.head_width, self.config.rope_base, x_BT3D.device)
        rotation = rotations(context.positions_BT, theta)
        x_BTD = input_BTD = norm(x_BTD)
        for site, block in enumerate(self.blocks):
            is_first, is_last = site == 0, site == self.config.num_layers - 1
            extra_BTD = first_BTD if is_first else last_BTD if is_last else None
            x_BTD = block(x_BTD, input_BTD, extra_BTD, rotation, site, context)
        return norm(x_BTD)

    forward = hidden

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """logits_BTV."""
        logits_BTV: Tensor = self.head(x_BTD)
        return logits_BTV

    def next_logprobs(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, V) natural log-probabilities of the next token, float32, one document a row."""
        context = RowContext(tokens_BT)
        logits_BTV = self.unembed(self.hidden(self.embed(tokens_BT, context), context))
        return logits_BTV.float().log_softmax(dim=-1)

    def roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "matrix", "embedding", "table", "head" or "gain"."""
        return {name: _role(name, parameter) for name, parameter in self.named_parameters()}


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, without a gain (Zhang & Sennrich 2019)."""
    return rms_norm(x, 1e-6)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    y: Tensor = _SquaredReLU.apply(x)
    return y


class _SquaredReLU(torch.autograd.Function):
    """Keeps max(x, 0) alone and goes back in two passes over it; autograd's own way takes four, and eager training of
    small models spends more time on such passes than on products (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        relu = x.relu()
        ctx.save_for_backward(relu)
        return relu * relu

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (relu,) = ctx.saved_tensors
        dx: Tensor = (dy * relu).mul_(2)
        return dx


def _role(name: str, parameter: Tensor) -> str:
    if parameter.ndim < 2:
        return "gain"
    family = name.split(".")[0]
    return {"tables": "table", "head": "head", "blocks": "matrix"}.get(family, "embedding")
