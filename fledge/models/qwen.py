"""qwen: the open decoders of Alibaba, Qwen2.5 and Qwen3.

Llama's block with two changes. Qwen2.5 (Yang et al. 2024) has biases on queries, keys and values (after Su 2023); Qwen3
(Yang et al. 2025) drops them and normalises queries and keys head by head instead (Henry et al. 2020; Dehghani et al.
2023), and its head width is a size of its own, not width / heads.
Shapes: B rows, T positions, D width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError
from fledge.layers.attention import Context, RowContext, require_fit
from fledge.layers.norms import RMSNorm
from fledge.layers.rope import Rotation, frequencies, rotate, rotations
from fledge.models.published import Published, RawConfig

Style = Literal["biased", "normed"]


@dataclass(frozen=True)
class QwenConfig:
    """`attention` "biased" is Qwen2.5's, "normed" Qwen3's. `num_kv_heads` divides `num_heads`; `head_width` is even.

    `init_std` 0.02 is that of the released configs.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    attention: Style
    max_positions: int | None = None
    rope_base: float = 1_000_000.0
    is_head_tied: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.num_layers, self.num_heads, self.num_kv_heads, self.mlp_width)
        if min(sizes) < 1 or (self.max_positions is not None and self.max_positions < 1):
            raise ConfigError(f"sizes must be positive, got {self}")
        if self.head_width < 2 or self.head_width % 2:
            raise ConfigError(f"head_width {self.head_width} must be positive and even")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.attention not in get_args(Style):
            raise ConfigError(f"attention '{self.attention}' is unknown; known are {', '.join(get_args(Style))}")
        if min(self.rope_base, self.norm_eps, self.init_std) <= 0:
            raise ConfigError(f"rope_base, norm_eps and init_std must be positive, got {self}")


class BiasedAttention(nn.Module):
    """Qwen2.5: biases on queries, keys and values, none on the output."""

    def __init__(self, config: QwenConfig, site: int) -> None:
        super().__init__()
        self.site = site
        self.head_width = config.head_width
        q_width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.query = nn.Linear(config.width, q_width)
        self.key = nn.Linear(config.width, kv_width)
        self.value = nn.Linear(config.width, kv_width)
        self.output = nn.Linear(q_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_width)
        q_BTHK = rotate(self.query(x_BTD).view(shape), rotation)
        k_BTGK = rotate(self.key(x_BTD).view(shape), rotation)
        v_BTGK = self.value(x_BTD).view(shape)
        y_BTHK = context.attend(self.site, q_BTHK, k_BTGK, v_BTGK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class NormedAttention(nn.Module):
    """Qwen3: queries and keys are normalised over each head before they are turned; no biases."""

    def __init__(self, config: QwenConfig, site: int) -> None:
        super().__init__()
        self.site = site
        self.head_width = config.head_width
        q_width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.query = nn.Linear(config.width, q_width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(q_width, config.width, bias=False)
        self.query_norm = RMSNorm(config.head_width, config.norm_eps)
        self.key_norm = RMSNorm(config.head_width, config.norm_eps)

    def forward(self, x_BTD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_width)
        q_BTHK = rotate(self.query_norm(self.query(x_BTD).view(shape)), rotation)
        k_BTGK = rotate(self.key_norm(self.key(x_BTD).view(shape)), rotation)
        v_BTGK = self.value(x_BTD).view(shape)
        y_BTHK = context.attend(self.site, q_BTHK, k_BTGK, v_BTGK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: QwenConfig, site: int) -> None:
        super().__init__()
        attention = {"biased": BiasedAttention, "normed": NormedAttention}[config.attention]
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = attention(config, site)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, context)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class Qwen(nn.Module):
    """A causal model."""

    def __init__(self, config: QwenConfig) -> None:
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
        """Draw every parameter anew, in the order of `named_parameters`: N(0, init_std), gains 1, biases 0.

        `generator` None is torch's global one.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, self.config.init_std, generator=generator)

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """x_BTD. `UserError` if a document is longer than `max_positions`."""
        require_fit(context, self.config.max_positions)
        x_BTD: Tensor = self.tokens(tokens_BT)
        return x_BTD

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        theta = frequencies(self.config.head_width, self.config.rope_base, x_BTD.device)
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
    "blocks.*.attention.query.*": "column",
    "blocks.*.attention.key.*": "column",
    "blocks.*.attention.value.*": "column",
    "blocks.*.attention.output.weight": "row",
    "blocks.*.attention.query_norm.weight": "replicate",
    "blocks.*.attention.key_norm.weight": "replicate",
    "blocks.*.mlp.gate.weight": "column",
    "blocks.*.mlp.up.weight": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.attention_norm.weight": "replicate",
    "blocks.*.mlp_norm.weight": "replicate",
    "final_norm.weight": "replicate",
    "head.weight": "vocab",
}


def _qwen25(width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> QwenConfig:
    """Yang et al. 2024, table 1, and the released configs: up to 3B the head is tied and the vocabulary padded less."""
    is_small = width <= 2048
    return QwenConfig(
        151936 if is_small else 152064,
        width,
        num_layers,
        num_heads,
        num_kv_heads,
        width // num_heads,
        mlp_width,
        "biased",
        32768,
        is_head_tied=is_small,
        norm_eps=1e-6 if width < 5120 else 1e-5,
    )


def _qwen3(width: int, num_layers: int, num_heads: int, mlp_width: int) -> QwenConfig:
    """Yang et al. 2025, table 1, and the released configs: 8 key/value heads, head width 128, tied up to 4B."""
    is_tied = width <= 2560
    return QwenConfig(151936, width, num_layers, num_heads, 8, 128, mlp_width, "normed", 40960, is_head_tied=is_tied)


PRESETS = {
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944),
    "qwen2.5-14b": _qwen25(5120, 48, 40, 8, 13824),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 27648),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
}


def _read_qwen2(raw: RawConfig) -> dict[str, Any]:
    width, num_heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    if not isinstance(width, int) or not isinstance(num_heads, int) or num_heads < 1:
        raise ConfigError(f"hidden_size {width!r} and num_attention_heads {num_heads!r} must be positive numbers")
    return _read_more(raw, width // num_heads)


def _read_qwen3(raw: RawConfig) -> dict[str, Any]:
    return _read_more(raw, 128)


def _read_more(raw: RawConfig, head_width: int) -> dict[str, Any]:
    """Grouped queries, the head width (`head_width` if left out) and the rotation, in its old or new spelling."""
    num_kv_heads, given_width, layers = (
        raw.pop("num_key_value_heads", 32),
        raw.pop("head_dim", None),
        raw.pop("layer_types", None),
    )
    if layers is not None and set(layers) != {"full_attention"}:
        raise ConfigError(f"layer_types {sorted(set(layers))} are not supported: known is full_attention")
    return {
        "num_kv_heads": raw.get("num_attention_heads", 32) if num_kv_heads is None else num_kv_heads,
        "head_width": head_width if given_width is None else given_width,
        "rope_base": _read_rope(raw),
    }


def _read_rope(raw: RawConfig) -> float:
    """The base; `ConfigError` for frequencies that are stretched, which Qwen does by YaRN (Peng et al. 2023)."""
    old, new = raw.pop("rope_scaling", None), raw.pop("rope_parameters", None)
    given = dict(new or old or {})
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    base: float = given.pop("rope_theta", raw.pop("rope_theta", 10000.0))
    kind = given.pop("rope_type", given.pop("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"rope type '{kind}' is not supported: known is default; leave rope_scaling out for short texts"
        )
    if given:
        raise ConfigError(f"rope type 'default' takes no fields but rope_theta, got {sorted(given)}")
    return base


def _write_more(config: QwenConfig) -> RawConfig:
    """The old spelling of the rotation, which old and new readers understand."""
    return {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "sliding_window": None,
    }


_LAYER_WEIGHTS = {
    "layers.*.input_layernorm.weight": ("blocks.*.attention_norm.weight",),
    "layers.*.self_attn.q_proj.weight": ("blocks.*.attention.query.weight",),
    "layers.*.self_attn.k_proj.weight": ("blocks.*.attention.key.weight",),
    "layers.*.self_attn.v_proj.weight": ("blocks.*.attention.value.weight",),
    "layers.*.self_attn.o_proj.weight": ("blocks.*.attention.output.weight",),
    "layers.*.post_attention_layernorm.weight": ("blocks.*.mlp_norm.weight",),
    "layers.*.mlp.gate_proj.weight": ("blocks.*.mlp.gate.weight",),
    "layers.*.mlp.up_proj.weight": ("blocks.*.mlp.up.weight",),
    "layers.*.mlp.down_proj.weight": ("blocks.*.mlp.down.weight",),
}
_BIASES = {
    "layers.*.self_attn.q_proj.bias": ("blocks.*.attention.query.bias",),
    "layers.*.self_attn.k_proj.bias": ("blocks.*.attention.key.bias",),
    "layers.*.self_attn.v_proj.bias": ("blocks.*.attention.value.bias",),
}
_NORMS = {
    "layers.*.self_attn.q_norm.weight": ("blocks.*.attention.query_norm.weight",),
    "layers.*.self_attn.k_norm.weight": ("blocks.*.attention.key_norm.weight",),
}


def _published(model_type: str, attention: Style, more: Mapping[str, tuple[str, ...]]) -> Published:
    return Published(
        architecture=f"{model_type.capitalize()}ForCausalLM",
        model_type=model_type,
        prefix="model.",
        fields={
            "vocab_size": ("vocab_size", 151936),
            "hidden_size": ("width", 4096),
            "num_hidden_layers": ("num_layers", 32),
            "num_attention_heads": ("num_heads", 32),
            "intermediate_size": ("mlp_width", 22016),
            "max_position_embeddings": ("max_positions", 32768),
            "tie_word_embeddings": ("is_head_tied", False),
            "rms_norm_eps": ("norm_eps", 1e-6),
            "initializer_range": ("init_std", 0.02),
        },
        fixed={
            "hidden_act": ("silu",),
            "attention_dropout": (0.0,),
            "use_sliding_window": (False,),
            "use_mrope": (False,),
            **({"attention_bias": (False,)} if attention == "normed" else {}),  # Qwen2's biases are not a setting
        },
        ours={"attention": attention},
        idle=frozenset({"sliding_window", "max_window_layers"}),  # without use_sliding_window they mean nothing
        weights={
            "embed_tokens.weight": ("tokens.weight",),
            **_LAYER_WEIGHTS,
            **more,
            "norm.weight": ("final_norm.weight",),
            "lm_head.weight": ("head.weight",),
        },
        read_more=_read_qwen2 if attention == "biased" else _read_qwen3,
        write_more=_write_more,
    )


PUBLISHED = (_published("qwen2", "biased", _BIASES), _published("qwen3", "normed", _NORMS))
