"""Tiny random models of several families, with what is known about each from its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 64
BLOCKS = 3
HIDDEN = 32


@dataclass(frozen=True)
class Family:
    """What tests expect of a family.

    fields:   of its configuration class beyond SIZES
    blocks:   the name of its list of blocks
    first:    modules with tensors before the blocks
    last:     modules with tensors after them, the head last
    tied:     whether head and embedding are one tensor by default
    parallel: whether attention and MLP read the block's input both
    groups:   linears that read the same tensor, in order of execution
    attention: linears of the attention branch;  shared: parameters of a block that both halves read
    """

    config: str
    fields: dict[str, Any]
    blocks: str
    first: tuple[str, ...]
    last: tuple[str, ...]
    tied: bool
    parallel: bool
    groups: tuple[tuple[str, ...], ...]
    attention: tuple[str, ...]
    shared: tuple[str, ...] = ()


SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2}
QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_GROUPS = (QKV, ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
LLAMA_LAST = ("model.norm", "lm_head")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaConfig",
        GROUPED,
        "model.layers",
        ("model.embed_tokens",),
        LLAMA_LAST,
        tied=False,
        parallel=False,
        groups=LLAMA_GROUPS,
        attention=(*QKV, "o_proj"),
    ),
    "opt": Family(
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
        "model.decoder.layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("model.decoder.final_layer_norm", "lm_head"),
        tied=True,
        parallel=False,
        groups=(QKV, ("out_proj",), ("fc1",), ("fc2",)),
        attention=(*QKV, "out_proj"),
    ),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
        "transformer.h",
        ("transformer.wte", "transformer.wpe"),
        ("transformer.ln_f", "lm_head"),
        tied=True,
        parallel=False,
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        attention=("attn.c_attn", "attn.c_proj"),
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {},
        "gpt_neox.layers",
        ("gpt_neox.embed_in",),
        ("gpt_neox.final_layer_norm", "embed_out"),
        tied=False,
        parallel=True,
        groups=(("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
        attention=("query_key_value", "dense"),
    ),
    "qwen3": Family(
        "Qwen3Config",
        {**GROUPED, "head_dim": 8},
        "model.layers",
        ("model.embed_tokens",),
        LLAMA_LAST,
        tied=False,
        parallel=False,
        groups=LLAMA_GROUPS,
        attention=(*QKV, "o_proj"),
    ),
    "gemma2": Family(
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 6},  # every other block sees six tokens only
        "model.layers",
        ("model.embed_tokens",),
        LLAMA_LAST,
        tied=True,
        parallel=False,
        groups=LLAMA_GROUPS,
        attention=(*QKV, "o_proj"),
    ),
    "phi": Family(
        "PhiConfig",
        {},
        "model.layers",
        ("model.embed_tokens",),
        ("model.final_layernorm", "lm_head"),
        tied=False,
        parallel=True,
        groups=((*QKV, "fc1"), ("dense",), ("fc2",)),
        attention=(*QKV, "dense"),
        shared=("input_layernorm.weight", "input_layernorm.bias"),
    ),
    "gptj": Family(
        "GPTJConfig",
        {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "transformer.h",
        ("transformer.wte",),
        ("transformer.ln_f", "lm_head"),
        tied=False,
        parallel=True,
        groups=((*QKV, "fc_in"), ("out_proj",), ("fc_out",)),
        attention=(*QKV, "out_proj"),
        shared=("ln_1.weight", "ln_1.bias"),
    ),
    "falcon": Family(
        "FalconConfig",
        {},
        "transformer.h",
        ("transformer.word_embeddings",),
        ("transformer.ln_f", "lm_head"),
        tied=True,
        parallel=True,
        groups=(("query_key_value", "dense_h_to_4h"), ("dense",), ("dense_4h_to_h",)),
        attention=("query_key_value", "dense"),
        shared=("input_layernorm.weight", "input_layernorm.bias"),
    ),
}


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode whose tensors all matter: no bias is zero, no norm is one."""
    import transformers

    known = FAMILIES[family]
    config = getattr(transformers, known.config)(**SIZES | known.fields | {"bos_token_id": 1} | changes)
    config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def token_ids(samples: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 (samples, tokens)."""
    return torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def in_family(linears: tuple[str, ...], name: str) -> bool:
    """Whether the full name of a linear is one of these short ones."""
    return any(name.endswith(f".{short}") for short in linears)
