"""gpt: the transformer decoders of OpenAI with learned positions: GPT-1, GPT-2 and GPT-3.

GPT-1 (Radford et al. 2018) normalises after each sublayer, GPT-2 (Radford et al. 2019) before it and once at the end;
the two blocks are two classes. GPT-3 (Brown et al. 2020) is GPT-2's block in which every second layer attends only
within a band (after Child et al. 2019, Sparse Transformer). Shapes: B rows, T positions, D width, H heads,
K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError
from fledge.layers.attention import Context, RowContext, drop_attention, require_fit
from fledge.models.published import Published, RawConfig


@dataclass(frozen=True)
class GPTConfig:
    """`window` w: layers 1, 3, 5, ... see only themselves and the w-1 positions before; None makes all layers dense.

    The three dropouts act in training mode only: on the sum of the embeddings, on what each sublayer adds, on the
    attention weights. `init_std` is the 0.02 of all three papers.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    max_positions: int = 1024
    block: Literal["post_norm", "pre_norm"] = "pre_norm"
    window: int | None = None
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.width, self.num_layers, self.num_heads, self.max_positions) < 1:
            raise ConfigError(f"sizes must be positive, got {self}")
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 or null, got {self.window}")
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.norm_eps <= 0 or self.init_std <= 0:
            raise ConfigError(f"norm_eps and init_std must be positive, got {self.norm_eps} and {self.init_std}")


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, site: int) -> None:
        super().__init__()
        self.site = site
        self.num_heads = config.num_heads
        self.window = config.window if site % 2 else None
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        shape = (*x_BTD.shape[:2], self.num_heads, -1)
        q_BTHK = self.query(x_BTD).view(shape)
        k_BTHK = self.key(x_BTD).view(shape)
        v_BTHK = self.value(x_BTD).view(shape)
        y_BTHK = context.attend(self.site, q_BTHK, k_BTHK, v_BTHK, window=self.window)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # The tanh form of GELU (Hendrycks & Gimpel 2016) is the one in OpenAI's released code.
        y_BTD: Tensor = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return y_BTD


class PostNormBlock(nn.Module):
    """GPT-1: every sublayer is added to the stream, and the sum is normalised (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig, site: int) -> None:
        super().__init__()
        self.attention = Attention(config, site)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.drop = nn.Dropout(config.residual_dropout)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.drop(self.attention(x_BTD, context)))
        x_BTD = self.mlp_norm(x_BTD + self.drop(self.mlp(x_BTD)))
        return x_BTD


class PreNormBlock(nn.Module):
    """GPT-2 and GPT-3: every sublayer reads a normalised copy, and the stream itself is never normalised."""

    def __init__(self, config: GPTConfig, site: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, site)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.residual_dropout)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attention(self.attention_norm(x_BTD), context))
        x_BTD = x_BTD + self.drop(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD


class GPT(nn.Module):
    """A causal model; the head is tied to the token embedding, as in all three papers."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.drop = nn.Dropout(config.embedding_dropout)
        if config.block == "post_norm":
            self.blocks = nn.ModuleList(PostNormBlock(config, site) for site in range(config.num_layers))
            self.final_norm: nn.Module = nn.Identity()
        else:
            self.blocks = nn.ModuleList(PreNormBlock(config, site) for site in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter anew, in the order of `named_parameters`; `generator` None is torch's global one.

        Weights N(0, init_std), biases 0, gains 1. With pre-norm the layers that write to the stream are scaled by
        1/sqrt(their number) (GPT-2, section 2.3), and positions have half the spread (0.01 in GPT-2's code).
        """
        config = self.config
        is_scaled = config.block == "pre_norm"
        into_stream = config.init_std / (2 * config.num_layers) ** 0.5 if is_scaled else config.init_std
        for name, parameter in self.named_parameters():
            if name.endswith(("output.weight", "down.weight")):
                parameter.normal_(0.0, into_stream, generator=generator)
            elif name == "positions.weight" and is_scaled:
                parameter.normal_(0.0, config.init_std / 2, generator=generator)
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.init_std, generator=generator)

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """x_BTD. `UserError` if a document is longer than `max_positions`."""
        require_fit(context, self.config.max_positions)
        x_BTD: Tensor = self.drop(self.tokens(tokens_BT) + self.positions(context.positions_BT))
        return x_BTD

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        context = drop_attention(context, self.config.attention_dropout if self.training else 0.0)
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
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
        """What each parameter is to an optimizer: "matrix", "embedding" or "gain" (all that has one axis)."""
        return {name: _role(name, parameter) for name, parameter in self.named_parameters()}


def _role(name: str, parameter: Tensor) -> str:
    if name in ("tokens.weight", "positions.weight"):
        return "embedding"
    return "matrix" if parameter.ndim == 2 else "gain"


# How each parameter is split over the ranks of a tensor-parallel group (Shoeybi et al. 2019, Megatron-LM): "column"
# by its outputs, "row" by its inputs, "vocab" by tokens, "replicate" not at all. `*` stands for a layer's number.
SHARD_PLAN = {
    "tokens.weight": "vocab",
    "positions.weight": "replicate",
    "blocks.*.attention.query.weight": "column",
    "blocks.*.attention.query.bias": "column",
    "blocks.*.attention.key.weight": "column",
    "blocks.*.attention.key.bias": "column",
    "blocks.*.attention.value.weight": "column",
    "blocks.*.attention.value.bias": "column",
    "blocks.*.attention.output.weight": "row",
    "blocks.*.attention.output.bias": "replicate",
    "blocks.*.mlp.up.weight": "column",
    "blocks.*.mlp.up.bias": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.mlp.down.bias": "replicate",
    "blocks.*.attention_norm.*": "replicate",
    "blocks.*.mlp_norm.*": "replicate",
    "final_norm.*": "replicate",
}


def _gpt1() -> GPTConfig:
    """Section 4.1: 12 layers, 12 heads of 64, 512 positions, 40,000 merges (40,478 tokens), dropout 0.1."""
    return GPTConfig(40478, 768, 12, 12, 512, "post_norm", None, 0.1, 0.1, 0.1)


def _gpt2(width: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(50257, width, num_layers, num_heads, 1024, "pre_norm", None, 0.1, 0.1, 0.1)


def _gpt3(width: int, num_layers: int, num_heads: int) -> GPTConfig:
    """The paper gives no band width (ours: 256) and no dropout (ours: none)."""
    return GPTConfig(50257, width, num_layers, num_heads, 2048, "pre_norm", 256)


# GPT-2: table 2 and the released weights. GPT-3: table 2.1, with two rows set right by the parameter counts of table
# D.1: XL has 16 heads of 128 (24 x 128 is not 2048), and 13B is 5120 wide (40 x 128; the table prints 5140).
PRESETS = {
    "gpt1-117m": _gpt1(),
    "gpt2-124m": _gpt2(768, 12, 12),
    "gpt2-355m": _gpt2(1024, 24, 16),
    "gpt2-774m": _gpt2(1280, 36, 20),
    "gpt2-1558m": _gpt2(1600, 48, 25),
    "gpt3-125m": _gpt3(768, 12, 12),
    "gpt3-350m": _gpt3(1024, 24, 16),
    "gpt3-760m": _gpt3(1536, 24, 16),
    "gpt3-1.3b": _gpt3(2048, 24, 16),
    "gpt3-2.7b": _gpt3(2560, 32, 32),
    "gpt3-6.7b": _gpt3(4096, 32, 32),
    "gpt3-13b": _gpt3(5120, 40, 40),
    "gpt3-175b": _gpt3(12288, 96, 96),
}


def _read_mlp_width(raw: RawConfig) -> dict[str, Any]:
    inner, width = raw.pop("n_inner", None), raw.get("n_embd", 768)
    if inner not in (None, 4 * width):
        raise ConfigError(f"n_inner {inner} is not supported: known is 4 x n_embd, here {4 * width}")
    return {}


_LAYER_WEIGHTS = {
    "h.*.ln_1.weight": ("blocks.*.attention_norm.weight",),
    "h.*.ln_1.bias": ("blocks.*.attention_norm.bias",),
    "h.*.attn.c_attn.weight": tuple(f"blocks.*.attention.{part}.weight" for part in ("query", "key", "value")),
    "h.*.attn.c_attn.bias": tuple(f"blocks.*.attention.{part}.bias" for part in ("query", "key", "value")),
    "h.*.attn.c_proj.weight": ("blocks.*.attention.output.weight",),
    "h.*.attn.c_proj.bias": ("blocks.*.attention.output.bias",),
    "h.*.ln_2.weight": ("blocks.*.mlp_norm.weight",),
    "h.*.ln_2.bias": ("blocks.*.mlp_norm.bias",),
    "h.*.mlp.c_fc.weight": ("blocks.*.mlp.up.weight",),
    "h.*.mlp.c_fc.bias": ("blocks.*.mlp.up.bias",),
    "h.*.mlp.c_proj.weight": ("blocks.*.mlp.down.weight",),
    "h.*.mlp.c_proj.bias": ("blocks.*.mlp.down.bias",),
    "lm_head.weight": ("head.weight",),
}
_TRANSPOSED = frozenset(f"h.*.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
_SIZES = {
    "n_embd": ("width", 768),
    "n_layer": ("num_layers", 12),
    "n_head": ("num_heads", 12),
    "embd_pdrop": ("embedding_dropout", 0.1),
    "resid_pdrop": ("residual_dropout", 0.1),
    "attn_pdrop": ("attention_dropout", 0.1),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "initializer_range": ("init_std", 0.02),
}
_IDLE = frozenset(
    {
        "n_ctx",
        "predict_special_tokens",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
    }
    | {"summary_type", "summary_use_proj", "n_special", "output_past", "gradient_checkpointing"}
)

PUBLISHED = (
    Published(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        prefix="transformer.",
        fields={"vocab_size": ("vocab_size", 50257), "n_positions": ("max_positions", 1024), **_SIZES},
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False, True),  # the order of rounding, not what is computed
            "tie_word_embeddings": (True,),
        },
        ours={"block": "pre_norm", "window": None},
        idle=_IDLE,
        weights={
            "wte.weight": ("tokens.weight",),
            "wpe.weight": ("positions.weight",),
            "ln_f.weight": ("final_norm.weight",),
            "ln_f.bias": ("final_norm.bias",),
            **_LAYER_WEIGHTS,
        },
        transposed=_TRANSPOSED,
        buffers=frozenset({"h.*.attn.bias", "h.*.attn.masked_bias"}),
        read_more=_read_mlp_width,
    ),
    Published(
        architecture="OpenAIGPTLMHeadModel",
        model_type="openai-gpt",
        prefix="transformer.",
        fields={"vocab_size": ("vocab_size", 40478), "n_positions": ("max_positions", 512), **_SIZES},
        fixed={
            "afn": ("gelu", "gelu_new"),
            "tie_word_embeddings": (True,),
        },  # this make calls the tanh form "gelu"
        ours={"block": "post_norm", "window": None},
        idle=_IDLE,
        weights={
            "tokens_embed.weight": ("tokens.weight",),
            "positions_embed.weight": ("positions.weight",),
            **_LAYER_WEIGHTS,
        },
        transposed=_TRANSPOSED,
        buffers=frozenset({"h.*.attn.bias", "position_ids"}),
    ),
)
