"""Tiny random models of many families, from the configs that the installed transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 64
PAD = 0

# What families call their sizes; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    "encoder_layers": 1,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("sliding_window", "attention_window", "attention_window_size"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    "mamba_expand": 2,
    "n_mamba_heads": 2,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
}
TOWER = {"image_size": 16, "patch_size": 8, "num_channels": 3}  # of a model that sees


_MLA = {"num_key_value_heads": 4, "head_dim": 4}  # DeepSeek's attention, with a latent for keys and values
_DECODER = {"is_decoder": True}
_HALVES = {"layer_types": ["linear_attention", "full_attention"]}

# What is behind a family's name changes its config; what follows a space in the name tells two of a family apart.
FAMILIES: dict[str, dict[str, Any]] = {
    # dense
    **{name: {} for name in ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "glm4", "olmo2", "smollm3")},
    **{name: {} for name in ("granite", "cohere", "stablelm", "starcoder2", "helium", "diffllama", "persimmon")},
    **{name: {} for name in ("gpt2", "gpt_neox", "gptj", "gpt_bigcode", "codegen", "opt", "biogpt", "xglm", "ctrl")},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "opt projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},  # as OPT-350m
    "openai-gpt": {},  # without a cache
    # sliding windows
    **{name: {} for name in ("cohere2", "olmo3", "exaone4", "modernbert-decoder")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "ministral": {"head_dim": 8},
    # ALiBi
    **{name: {} for name in ("bloom", "mpt")},
    "falcon alibi": {"alibi": True, "new_decoder_architecture": False},
    # soft caps, scaled embeddings, layers that share keys and values
    **{name: {} for name in ("gemma", "gemma2", "gemma3_text", "vaultgemma")},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    # mixtures of experts
    **{name: {} for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "llama4_text", "gpt_oss")},
    **{name: {} for name in ("granitemoe", "jetmoe", "glm4_moe", "ernie4_5_moe", "minimax_m2")},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    # state spaces and linear attention, alone and beside attention
    **{name: {} for name in ("mamba", "falcon_mamba", "falcon_h1", "nemotron_h", "lfm2", "minimax")},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zamba2": {
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "olmo_hybrid"), _HALVES),
    # models that see, fed with text
    **{name: {} for name in ("gemma3", "llama4", "fuyu")},
    # encoders made decoders; positions of some begin after the padding id
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra"), _DECODER),
    "rembert": {**_DECODER, "input_embedding_size": 16, "output_embedding_size": 24},
}

_FUTURE = "what follows a token changes its log-probability"
_PADDING = "padding on the left reaches what it computes"
# Those that are refused, with the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert encoder": ({}, _FUTURE),
    "roberta encoder": ({}, _FUTURE),
    "xlnet": ({}, _FUTURE),
    "xlm": ({}, _FUTURE),
    "rwkv": ({}, _PADDING),
    "xlstm": ({}, _PADDING),
    "recurrent_gemma": ({"num_hidden_layers": 3, "num_key_value_heads": 4}, _PADDING),
    "bart": ({}, _PADDING),
    "whisper": ({}, _PADDING),
    "roformer": (_DECODER, _PADDING),
    "moshi": ({}, "its cache does not continue a text as a pass reads it"),
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of this family with the sizes above; `changes` as the config takes them, those of parts as mappings."""
    kind = CONFIG_MAPPING[model_type]
    standard = kind()
    parts = {name: getattr(standard, name, None) for name in getattr(kind, "sub_configs", {})}
    settings: dict[str, Any] = {}
    for name, part in parts.items():
        if part is not None:
            own = changes.pop(name, {})
            settings[name] = {**_sizes(part, {**SIZES, **(TOWER if name != "text_config" else {})}, own), **own}
    if "text_config" not in parts:
        settings |= _sizes(standard, SIZES, changes)
    return kind(**{**settings, **changes})


def _sizes(config: Any, sizes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    known = vars(config)
    return {
        name: size
        for name, size in sizes.items()
        if name in known and name not in own and (known[name] is not None or name.endswith("_token_id"))
    }


def tiny_model(config: Any) -> Any:
    """A model whose every tensor counts: new ones have zeros and ones where a missing tensor would not be seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        shake(model, 0.2)
    return model.eval()


@torch.no_grad()
def shake(model: nn.Module, size: float) -> None:
    """Random numbers in place of matrices and added to the rest, of parameters and of buffers that are saved."""
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in saved or not tensor.is_floating_point():
            continue
        noise = size * torch.randn_like(tensor)
        if tensor.ndim < 2:
            tensor.add_(0.5 * noise)
        elif isinstance(tensor, nn.Parameter):  # a buffer may be a mask
            tensor.copy_(noise)


def save_tiny(folder: Path, model_type: str, **changes: Any) -> Path:
    tiny_model(tiny_config(model_type, **changes)).save_pretrained(folder)
    return folder
