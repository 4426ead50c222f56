"""The decoder of builtin:pystdlib as plain PyTorch, with the parameter names of LlamaForCausalLM.

Written out because training compiles it as one graph without masks or caches; the export checks that
transformers computes the same loss from the same weights.
"""

# B windows, T tokens of a window, D hidden, H heads, K key/value heads, E width of a head, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
HIDDEN, HEADS, KEY_HEADS, HEAD_WIDTH = 256, 8, 4, 32


def rotary_tables(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of the rotary embedding, halves layout (arXiv 2104.09864, as in Llama)."""
    frequency = CONFIG["rope_theta"] ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
    angle = torch.outer(torch.arange(length).float(), frequency)
    angle_TE = torch.cat([angle, angle], dim=-1)
    return angle_TE.cos(), angle_TE.sin()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turns each pair (e, e + E/2) by its position's angle, in float32."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos_TE + torch.cat([-right, left], dim=-1) * sin_TE).to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_WIDTH, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KEY_HEADS * HEAD_WIDTH, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KEY_HEADS * HEAD_WIDTH, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_WIDTH, HIDDEN, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        split = (*x_BTD.shape[:2], -1, HEAD_WIDTH)
        query = rotate(self.q_proj(x_BTD).view(split).transpose(1, 2), cos_TE, sin_TE)
        key = rotate(self.k_proj(x_BTD).view(split).transpose(1, 2), cos_TE, sin_TE)
        value = self.v_proj(x_BTD).view(split).transpose(1, 2)
        groups = HEADS // KEY_HEADS
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated MLP (SwiGLU)."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(HIDDEN, width, bias=False)
        self.up_proj = nn.Linear(HIDDEN, width, bias=False)
        self.down_proj = nn.Linear(width, HIDDEN, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One decoder block; dropout acts on what its two halves add to the stream."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = FeedForward()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=CONFIG["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=CONFIG["rms_norm_eps"])
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        x_BTD = x_BTD + functional.dropout(attended, self.dropout, self.training)
        widened = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + functional.dropout(widened, self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, blocks and final norm; the head is the embedding."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], HIDDEN)
        self.layers = nn.ModuleList([Block(dropout) for _ in range(CONFIG["num_hidden_layers"])])
        self.norm = nn.RMSNorm(HIDDEN, eps=CONFIG["rms_norm_eps"])


class LanguageModel(nn.Module):
    """Next-token loss of windows; `state_dict` keys are those of LlamaForCausalLM with tied embeddings."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Decoder(dropout)
        cos_TE, sin_TE = rotary_tables(CONFIG["max_position_embeddings"])
        self.register_buffer("cos_TE", cos_TE, persistent=False)
        self.register_buffer("sin_TE", sin_TE, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Normal(0, 0.02); what adds to the stream is smaller by the root of its 2 * blocks addends."""
        addends = 2 * CONFIG["num_hidden_layers"]
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                scale = addends**-0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=CONFIG["initializer_range"] * scale)

    def forward(self, input_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Loss of every target in nats, (B * T,), float32."""
        length = input_BT.shape[1]
        x_BTD = self.model.embed_tokens(input_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, self.cos_TE[:length], self.sin_TE[:length])
        logits = functional.linear(self.model.norm(x_BTD), self.model.embed_tokens.weight).float()
        return functional.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none")
