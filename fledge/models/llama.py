"""llama: the open decoders of Meta and those built alike (TinyLlama, SmolLM2).

Pre-norm with RMSNorm, rotary positions, SwiGLU, no biases (Touvron et al. 2023, LLaMA); grouped queries (Llama 2,
after Ainslie et al. 2023); stretched rotary frequencies (Llama 3, Grattafiori et al. 2024).
Shapes: B rows, T positions, D width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError
from fledge.layers.attention import Context, RowContext, require_fit
from fledge.layers.norms import RMSNorm
from fledge.layers.rope import Llama3Scaling, Rotation, frequencies, rotate, rotations, stretch
from fledge.models.published import Published, RawConfig


@dataclass(frozen=True)
class LlamaConfig:
    """`num_kv_heads` divides `num_heads`; equal, it is plain multi-head attention. The head width is even.

    `init_std` 0.02 is GPT-2's; the Llama papers give none.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    max_positions: int | None = None
    rope_base: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    is_head_tied: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = (
            self.vocab_size,
            self.width,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.mlp_width,
        )
        if min(sizes) < 1 or (self.max_positions is not None and self.max_positions < 1):
            raise ConfigError(f"sizes must be positive, got {self}")
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width {self.width} must be num_heads {self.num_heads} times an even head width")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if min(self.rope_base, self.norm_eps, self.init_std) <= 0:
            raise ConfigError(f"rope_base, norm_eps and init_std must be positive, got {self}")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, site: int) -> None:
        super().__init__()
        self.site = site
        self.head_width = config.head_width
        kv_width = config.num_kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_width)
        q_BTHK = rotate(self.query(x_BTD).view(shape), rotation)
        k_BTGK = rotate(self.key(x_BTD).view(shape), rotation)
        v_BTGK = self.value(x_BTD).view(shape)
        y_BTHK = context.attend(self.site, q_BTHK, k_BTGK, v_BTGK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, site: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, site)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, context)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class Llama(nn.Module):
    """A causal model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, site) for site in range(config.num_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.is_head_tied:
            self.head.weight = self.tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter anew, in the order of `named_parameters`: N(0, init_std), gains 1.

        `generator` None is torch's global one.
        """
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.init_std, generator=generator)

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """x_BTD. `UserError` if a document is longer than `max_positions`."""
        require_fit(context, self.config.max_positions)
        x_BTD: Tensor = self.tokens(tokens_BT)
        return x_BTD

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        config = self.config
        theta = frequencies(config.head_width, config.rope_base, x_BTD.device)
        if config.rope_scaling is not None:
            theta = stretch(theta, config.rope_scaling)
        rotation = rotations(context.positions_BT, theta)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, context)
        x_BTD = self.final_norm(x_BTD)
        return x_BTD

    def hidden(self, x_BTD: Tensor, context: Context) -> Tensor:
        """x_BTD, ready for `unembed`, from what `embed` returned; through `__call__`, so that hooks see it."""
        y_BTD: Tensor = self(x_BTD, context)
        return y_BTD

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
        """What each parameter is to an optimizer: "matrix", "embedding", "head" (none if tied) or "gain"."""
        return {name: _role(name, parameter) for name, parameter in self.named_parameters()}


def _role(name: str, parameter: Tensor) -> str:
    named = {"tokens.weight": "embedding", "head.weight": "head"}
    return named.get(name, "matrix" if parameter.ndim == 2 else "gain")


# How each parameter is split over the ranks of a tensor-parallel group (Shoeybi et al. 2019, Megatron-LM): "column"
# by its outputs, "row" by its inputs, "vocab" by tokens, "replicate" not at all. `*` stands for a layer's number.
SHARD_PLAN = {
    "tokens.weight": "vocab",
    "blocks.*.attention.query.weight": "column",
    "blocks.*.attention.key.weight": "column",
    "blocks.*.attention.value.weight": "column",
    "blocks.*.attention.output.weight": "row",
    "blocks.*.mlp.gate.weight": "column",
    "blocks.*.mlp.up.weight": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.attention_norm.weight": "replicate",
    "blocks.*.mlp_norm.weight": "replicate",
    "final_norm.weight": "replicate",
    "head.weight": "vocab",
}


def _llama1(width: int, num_layers: int, num_heads: int, mlp_width: int) -> LlamaConfig:
    """Touvron et al. 2023, table 2; the MLP is 2/3 of 4 x width, rounded up to 256. 1e-6 from the released configs."""
    return LlamaConfig(32000, width, num_layers, num_heads, num_heads, mlp_width, 2048, norm_eps=1e-6)


def _llama2(width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> LlamaConfig:
    return LlamaConfig(32000, width, num_layers, num_heads, num_kv_heads, mlp_width, 4096)


def _smol(width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> LlamaConfig:
    """Allal et al. 2025 (SmolLM2), the released configs."""
    return LlamaConfig(49152, width, num_layers, num_heads, num_kv_heads, mlp_width, 8192, 100_000.0, is_head_tied=True)


PRESETS = {
    "llama1-7b": _llama1(4096, 32, 32, 11008),
    "llama1-13b": _llama1(5120, 40, 40, 13824),
    "llama1-33b": _llama1(6656, 60, 52, 17920),
    "llama1-65b": _llama1(8192, 80, 64, 22016),
    "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama3-8b": LlamaConfig(128256, 4096, 32, 32, 8, 14336, 8192, 500_000.0),
    "llama3.2-1b": LlamaConfig(
        128256,
        2048,
        16,
        32,
        8,
        8192,
        131072,
        500_000.0,
        Llama3Scaling(32.0, 1.0, 4.0, 8192),
        is_head_tied=True,
    ),
    "tinyllama-1.1b": LlamaConfig(32000, 2048, 22, 32, 4, 5632, 2048),
    "smollm2-135m": replace(_smol(576, 30, 9, 3, 1536), init_std=1 / 24),
    "smollm2-360m": _smol(960, 32, 15, 5, 2560),
    "smollm2-1.7b": replace(_smol(2048, 24, 32, 32, 8192), rope_base=130_000.0),
}


# Llama 3's names for the four numbers of a stretched rotation -> ours.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "original_max_position_embeddings": "original_positions",
}


def _read_more(raw: RawConfig) -> dict[str, Any]:
    """Grouped queries, the head width (which must be width / heads) and the rotation, in its old or new spelling."""
    width, num_heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    num_kv_heads, head_width = raw.pop("num_key_value_heads", None), raw.pop("head_dim", None)
    if head_width is not None and head_width * num_heads != width:
        raise ConfigError(
            f"head_dim {head_width} is not supported: known is hidden_size / num_attention_heads, {width} / {num_heads}"
        )
    kv = {"num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads}
    return {**kv, **_read_rope(raw)}


def _read_rope(raw: RawConfig) -> dict[str, Any]:
    old, new = raw.pop("rope_scaling", None), raw.pop("rope_parameters", None)
    given = dict(new or old or {})
    base = raw.pop("rope_theta", 10000.0)
    base = given.pop("rope_theta", base)
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope type '{kind}' is not supported: known are default, llama3")
    wanted = set(_SCALING) if kind == "llama3" else set()
    if set(given) != wanted:
        raise ConfigError(f"rope type '{kind}' takes the fields {sorted(wanted)}, got {sorted(given)}")
    scaling = {ours: given[theirs] for theirs, ours in _SCALING.items()} if kind == "llama3" else None
    return {"rope_base": base, "rope_scaling": scaling}


def _write_more(config: LlamaConfig) -> RawConfig:
    """The old spelling of the rotation, which old and new readers understand."""
    scaling = config.rope_scaling
    numbers = {theirs: getattr(scaling, ours) for theirs, ours in _SCALING.items()} if scaling else {}
    return {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rope_theta": config.rope_base,
        "rope_scaling": {"rope_type": "llama3", **numbers} if scaling else None,
    }


PUBLISHED = (
    Published(
        architecture="LlamaForCausalLM",
        model_type="llama",
        prefix="model.",
        fields={
            "vocab_size": ("vocab_size", 32000),
            "hidden_size": ("width", 4096),
            "num_hidden_layers": ("num_layers", 32),
            "num_attention_heads": ("num_heads", 32),
            "intermediate_size": ("mlp_width", 11008),
            "max_position_embeddings": ("max_positions", 2048),
            "tie_word_embeddings": ("is_head_tied", False),
            "rms_norm_eps": ("norm_eps", 1e-6),
            "initializer_range": ("init_std", 0.02),
        },
        fixed={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "attention_dropout": (0.0,),
            "mlp_bias": (False,),
            "rope_interleaved": (False,),
        },
        ours={},
        idle=frozenset({"pretraining_tp", "is_llama_config", "transformers.js_config", "max_sequence_length"}),
        weights={
            "embed_tokens.weight": ("tokens.weight",),
            "layers.*.input_layernorm.weight": ("blocks.*.attention_norm.weight",),
            "layers.*.self_attn.q_proj.weight": ("blocks.*.attention.query.weight",),
            "layers.*.self_attn.k_proj.weight": ("blocks.*.attention.key.weight",),
            "layers.*.self_attn.v_proj.weight": ("blocks.*.attention.value.weight",),
            "layers.*.self_attn.o_proj.weight": ("blocks.*.attention.output.weight",),
            "layers.*.post_attention_layernorm.weight": ("blocks.*.mlp_norm.weight",),
            "layers.*.mlp.gate_proj.weight": ("blocks.*.mlp.gate.weight",),
            "layers.*.mlp.up_proj.weight": ("blocks.*.mlp.up.weight",),
            "layers.*.mlp.down_proj.weight": ("blocks.*.mlp.down.weight",),
            "norm.weight": ("final_norm.weight",),
            "lm_head.weight": ("head.weight",),
        },
        buffers=frozenset({"layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"}),
        read_more=_read_more,
        write_more=_write_more,
    ),
)
