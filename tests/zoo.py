"""Tiny random models of any family that transformers maps to a causal language model, by its `model_type`."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Module = TypeVar("Module", bound=torch.nn.Module)

VOCABULARY, HIDDEN, BLOCKS, POSITIONS = 64, 32, 2, 64

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "embed_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 48
    ),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group"), 1),
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention"), 6),
    "word_embed_proj_dim": HIDDEN,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rope_dim": 8,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": 1,
}

# What families need beyond SIZES.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    | {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    | {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "no_rope_layers": [1, 0]},
    "mamba2": {"head_dim": 16},
    "modernbert-decoder": {"pad_token_id": 0},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "zaya": {"num_experts_per_tok": 1},
}

# Those that must work, each tried in `tests/reconstruction/test_families.py`; of the others
# `benchmarks/families.py` says whether they do.
ZOO = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "gemma2", "gemma3_text"),
    *("phi3", "opt", "gpt2", "gpt_neox", "gptj", "falcon", "bloom", "olmo2", "granite", "starcoder2"),
    *("cohere", "nemotron", "smollm3", "gpt_oss", "llama4_text", "stablelm", "qwen2_moe", "mpt"),
)

# What these do differently covers the rest: parallel halves, inputs first, residuals added by branches, all kinds of
# experts, latent attention. The others are long tests.
SHORT = ("llama", "gpt2", "gpt_neox", "bloom", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text")
each_family = pytest.mark.parametrize(
    "family", [family if family in SHORT else pytest.param(family, marks=pytest.mark.long) for family in ZOO]
)

LARGEST = 20_000_000  # parameters of a model that is still called tiny


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a model of two blocks, 32 wide; of one in which text is a part, with all parts as small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**_tiny_fields(kind) | FIELDS.get(family, {}) | changes)


def _tiny_fields(kind: type[PretrainedConfig]) -> dict[str, Any]:
    known = {name for parent in kind.__mro__ for name in inspect.get_annotations(parent)}
    fields = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention: as many as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    parts = {name: part for name, part in kind.sub_configs.items() if hasattr(part, "sub_configs")}
    for name, part in parts.items():  # others are of any kind, and stay as large as they are
        model_type = getattr(part, "model_type", "")
        fields[name] = _tiny_fields(part) | ({"model_type": model_type} if model_type else {})
    return fields


def make_zoo_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode whose tensors all matter: no bias is zero, no norm is one.

    Raises ValueError for a model that is large all the same.
    """
    import transformers
    from accelerate import init_empty_weights

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    make = transformers.AutoModelForCausalLM.from_config
    if family not in ZOO:
        with init_empty_weights(include_buffers=False):
            parameters = sum(parameter.numel() for parameter in make(copy.deepcopy(config)).parameters())
        if parameters > LARGEST:
            raise ValueError(f"{parameters:,} parameters with the sizes that are set here")
    model: PreTrainedModel = make(config, dtype=torch.float32).eval()
    return randomize(model)


@torch.no_grad()
def randomize(model: Module) -> Module:
    """Vectors differ from what they are at first by up to 0.3; matrices keep the size of what passes through them."""
    for parameter in model.parameters():
        if parameter.dim() <= 1 or min(parameter.shape) == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
