"""The building blocks of Gemma 2, Gemma 3 and T5Gemma 2; parameter names are checkpoint keys.

Sources: transformers 5.23, models/gemma2, gemma3 and t5gemma2; arXiv 2512.14856, section 2, for merged attention.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5g2convert.checkpoint.families.text_and_vision import Activation, TextConfig
from t5g2convert.reference.attention import Kernel, Keys, Rotation, attend, attend_fused, rotate
from t5g2convert.reference.cache import LayerCache


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_python(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return torch.square(functional.relu(x))


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = {
    "gelu": functional.gelu,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_new,
    "gelu_python": _gelu_python,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "linear": _linear,
    "mish": functional.mish,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _relu2,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""Activation functions by their names in config.json, with the order of operations of `transformers.activations`."""


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32, times 1 + weight, and rounded once at the end."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of a tensor of any shape; the dtype does not change."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without random initialisation: its values come from a checkpoint."""

    def reset_parameters(self) -> None:
        """Leave the parameters unchanged."""


class MLP(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, settings: TextConfig) -> None:
        super().__init__()
        hidden, inner = settings.hidden_size, settings.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)
        self.activation = ACTIVATIONS[settings.hidden_activation]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.down_proj(self.activation(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Projections(nn.Module):
    """The projections of grouped-query attention, and, from Gemma 3 on, the norms of queries and keys."""

    def __init__(self, settings: TextConfig, kernel: Kernel) -> None:
        super().__init__()
        hidden, self.head_dim = settings.hidden_size, settings.head_dim
        query, key_value = settings.num_attention_heads * self.head_dim, settings.num_key_value_heads * self.head_dim
        bias = settings.attention_bias
        self.q_proj = Linear(hidden, query, bias=bias)
        self.k_proj = Linear(hidden, key_value, bias=bias)
        self.v_proj = Linear(hidden, key_value, bias=bias)
        self.o_proj = Linear(query, hidden, bias=bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, settings.rms_norm_eps) if settings.qk_norm else nn.Identity() for _ in range(2)
        )
        self.scale = settings.query_pre_attn_scalar**-0.5
        self.softcap = settings.attn_logit_softcapping
        # torch's fused kernel has no softcap.
        self.fused = kernel == "sdpa" and self.softcap is None

    def project(self, x_BTC: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the stack's own tokens; queries and keys are normed and rotated."""
        q_BHTD = rotate(self.q_norm(self.heads(self.q_proj(x_BTC))), turn)
        k_BKTD = rotate(self.k_norm(self.heads(self.k_proj(x_BTC))), turn)
        return q_BHTD, k_BKTD, self.heads(self.v_proj(x_BTC))

    def project_memory(self, memory_BMC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the encoder's output, not rotated: it has no position in the decoder's sequence."""
        return self.k_norm(self.heads(self.k_proj(memory_BMC))), self.heads(self.v_proj(memory_BMC))

    def heads(self, x_BTN: Tensor) -> Tensor:
        """[B, T, heads * D] to [B, heads, T, D]."""
        batch, tokens, _ = x_BTN.shape
        return x_BTN.view(batch, tokens, -1, self.head_dim).transpose(1, 2)

    def attended(self, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen_BTS: Tensor) -> Tensor:
        """Attend to one set of keys, and project the result back to the hidden width."""
        if self.fused:
            return self.gather(attend_fused(q_BHTD, k_BKSD, v_BKSD, seen_BTS, scale=self.scale))
        return self.gather(attend(q_BHTD, [Keys(k_BKSD, v_BKSD, seen_BTS)], scale=self.scale, softcap=self.softcap))

    def gather(self, output_BHTD: Tensor) -> Tensor:
        """Concatenate the heads, and project them back to the hidden width."""
        return self.o_proj(output_BHTD.transpose(1, 2).flatten(2))


class SelfAttention(Projections):
    """The self-attention of Gemma and of the encoder: tokens see each other as the mask allows."""

    def forward(self, x_BTC: Tensor, turn: Rotation, seen_BTS: Tensor, cache: LayerCache | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; the tokens in a cache come before these tokens."""
        q_BHTD, k_BKSD, v_BKSD = self.project(x_BTC, turn)
        if cache is not None:
            k_BKSD, v_BKSD = (both[:, :, cache.memory_length :] for both in cache.append(k_BKSD, v_BKSD))
        return self.attended(q_BHTD, k_BKSD, v_BKSD, seen_BTS)


class MergedAttention(Projections):
    """The decoder's attention to own tokens and the encoder's output, under one softmax with the same projections."""

    def forward(
        self,
        x_BTC: Tensor,
        turn: Rotation,
        seen_BTS: Tensor,
        memory_BMC: Tensor,
        memory_seen_BTM: Tensor,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C].

        Args:
            x_BTC: The states of the querying tokens; with a cache, only of tokens that the cache does not hold yet.
            turn: The rotation of these tokens.
            seen_BTS: The own tokens that each token may see, those in the cache first.
            memory_BMC: The encoder's output; it gets k_norm but no rotation.
            memory_seen_BTM: The memory tokens that each token may see.
            cache: Holds the keys and values of the memory, computed once, and of earlier tokens.
        """
        q_BHTD, k_BKSD, v_BKSD = self.project(x_BTC, turn)
        joined, count = None, memory_BMC.shape[1]
        if cache is None:
            k_BKMD, v_BKMD = self.project_memory(memory_BMC)
        else:
            if not cache.started:
                cache.start(*self.project_memory(memory_BMC))
            joined = cache.append(k_BKSD, v_BKSD)
            (k_BKMD, k_BKSD), (v_BKMD, v_BKSD) = ((both[:, :, :count], both[:, :, count:]) for both in joined)
        if self.fused:
            seen = torch.cat((memory_seen_BTM, seen_BTS), -1)
            k_all, v_all = joined or (torch.cat((k_BKMD, k_BKSD), 2), torch.cat((v_BKMD, v_BKSD), 2))
            return self.gather(attend_fused(q_BHTD, k_all, v_all, seen, scale=self.scale))
        groups = [Keys(k_BKSD, v_BKSD, seen_BTS), Keys(k_BKMD, v_BKMD, memory_seen_BTM)]
        return self.gather(attend(q_BHTD, groups, scale=self.scale, softcap=self.softcap))


class GemmaLayer(nn.Module):
    """A layer of Gemma 2 and Gemma 3: attention and MLP, each with a norm before and after."""

    def __init__(self, settings: TextConfig, kernel: Kernel) -> None:
        super().__init__()
        norm = partial(RMSNorm, settings.hidden_size, settings.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(settings, kernel)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(settings)
        self.post_feedforward_layernorm = norm()

    def forward(self, x_BTC: Tensor, turn: Rotation, seen_BTT: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x_BTC = x_BTC + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_BTC), turn, seen_BTT))
        return x_BTC + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTC)))


class StackLayer(nn.Module):
    """The common layer of all encoders and decoders: Gemma's layer with other names, in two steps."""

    attention: type[Projections] = SelfAttention

    def __init__(self, settings: TextConfig, kernel: Kernel) -> None:
        super().__init__()
        norm = partial(RMSNorm, settings.hidden_size, settings.rms_norm_eps)
        self.pre_self_attn_layernorm = norm()
        self.self_attn = self.attention(settings, kernel)
        self.post_self_attn_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(settings)
        self.post_feedforward_layernorm = norm()

    def through_attention(self, x_BTC: Tensor, *attention: object) -> Tensor:
        """[B, T, C] to [B, T, C]; `attention` holds the other arguments of the attention."""
        return x_BTC + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(x_BTC), *attention))

    def through_mlp(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return x_BTC + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTC)))


class EncoderLayer(StackLayer):
    """A layer of T5Gemma's or T5Gemma 2's encoder."""

    def forward(self, x_BTC: Tensor, *attention: object) -> Tensor:
        """[B, T, C] to [B, T, C]; `attention` holds the other arguments of the attention."""
        return self.through_mlp(self.through_attention(x_BTC, *attention))


class DecoderLayer(EncoderLayer):
    """A layer of T5Gemma 2's decoder: merged attention in place of self-attention."""

    attention = MergedAttention
