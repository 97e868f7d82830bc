"""Tiny random models, a case an architecture and one a variant, and token batches for them.

The sizes differ from each other and are odd where they may be, so that a mistaken one does not
fit. The weights are large, biases and norms random, and settings are no defaults, so that the
functions are far from linear and nothing that is forgotten is near its neutral value.
"""

import copy

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from grail_hf import ARCHITECTURES
from grail_hf.config import ATTENTION_UNITS
from grail_hf.runtime.layers import LayerPlacement

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "rms_norm_eps": 1e-2,
    "attention_dropout": 0.5,
    "pad_token_id": 3,
}

# name -> what its config has besides SIZES (None: it lacks the key); the model type is the name
# unless given. A llama moves to mistral where 9 heads are left, which do not divide 48; one with
# biases cannot.
CASES = {
    "llama": {},
    "llama-biases": {
        "model_type": "llama",
        "hidden_size": 72,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-multi-head": {"model_type": "llama", "num_key_value_heads": 12},
    "llama-derived-head-dim": {"model_type": "llama", "head_dim": None},
    "llama-tied-scaled-rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {},
    "qwen2-derived-head-dim": {"model_type": "qwen2", "head_dim": None},
    "qwen2-mixed": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {},
    "qwen3-biases": {"model_type": "qwen3", "attention_bias": True},
}

# A line a model type, and one a variant: what its config has besides SIZES, as above.
FULL_HEADS = {"head_dim": None}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
}
ROTARY = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    "head_dim": 12,
}
# Vision towers, as small as they go; they are not called.
VISION = {"hidden_size": 8, "intermediate_size": 9, "num_attention_heads": 2, "patch_size": 4}
VISION |= {"num_hidden_layers": 1, "image_size": 16}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 9,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN_VISION |= {"embed_dim": 8, "out_hidden_size": 48, "num_position_embeddings": 16}
TOKENS = {f"{name}_token_id": 90 for name in ("image", "video", "vision_start", "vision_end")}


def inside(decoder, vision, **others):
    """The values of a model with a text decoder inside."""
    return {"text_config": decoder, "vision_config": vision} | others


def multimodal_rotary(*sections):
    return {"rope_parameters": SIZES["rope_parameters"] | {"mrope_section": sections}}


SCALES = {"embedding_multiplier": 2.0, "attention_multiplier": 0.4, "residual_multiplier": 0.3}
# The first layer is dense. Five experts, so that with two a token some see few of the tokens.
QWEN_MIXTURE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "mlp_only_layers": [0],
}
DEEPSEEK = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "q_lora_rank": 9,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": None,
    "num_key_value_heads": 12,
}
GEMMA4 = MIXED | {
    "sliding_window": 7,
    "rope_parameters": None,
    "global_head_dim": 14,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 5,
    "vocab_size_per_layer_input": 97,
}
ARCHITECTURE_CASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "ministral": MIXED | {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "gemma": {},
    "gemma2": MIXED | {"sliding_window": 7, "attention_bias": True},
    "gemma3_text": MIXED | {"sliding_window": 7, "rope_parameters": None},
    "gemma4_text": GEMMA4,
    "phi": ROTARY,
    "phi-normed": ROTARY | FULL_HEADS | {"model_type": "phi", "qk_layernorm": True},
    "phi3": {},
    "gpt2": FULL_HEADS,
    "gpt_neox": FULL_HEADS,
    "gpt_neox-sequential": FULL_HEADS | {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gptj": FULL_HEADS | {"rotary_dim": 2, "num_hidden_layers": 5},
    "opt": FULL_HEADS | {"ffn_dim": 83, "word_embed_proj_dim": 20},
    "opt-normed-behind": FULL_HEADS
    | {"model_type": "opt", "ffn_dim": 83, "do_layer_norm_before": False},
    "bloom": FULL_HEADS | {"num_hidden_layers": 5},
    "falcon": FULL_HEADS | {"ffn_hidden_size": 83, "bias": True, "num_hidden_layers": 5},
    "falcon-new": FULL_HEADS
    | {
        "model_type": "falcon",
        "ffn_hidden_size": 83,
        "new_decoder_architecture": True,
        "num_kv_heads": 4,
    },
    "falcon-alibi": FULL_HEADS
    | {
        "model_type": "falcon",
        "ffn_hidden_size": 83,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
    },
    "starcoder2": {"sliding_window": 7},
    "stablelm": ROTARY | FULL_HEADS | {"use_qkv_bias": True, "qk_layernorm": True},
    "stablelm-parallel": ROTARY
    | FULL_HEADS
    | {"model_type": "stablelm", "use_parallel_residual": True},
    "olmo": {"clip_qkv": 3.0},
    "olmo-unclipped": {"model_type": "olmo", "clip_qkv": None},
    "olmo2": {},
    "olmo3": MIXED | {"sliding_window": 7, "rope_parameters": None},
    "olmo_hybrid": LINEAR,
    "granite": SCALES | {"attention_bias": True, "mlp_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere": {"use_qk_norm": True, "attention_bias": True},
    "cohere2": MIXED | {"sliding_window": 7},
    "glm": ROTARY | {"attention_bias": True},
    "glm4": ROTARY | {"attention_bias": True},
    "exaone4": MIXED | {"sliding_window": 7, "sliding_window_pattern": 2},
    "nemotron": ROTARY | {"mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "seed_oss": {"attention_out_bias": True, "residual_dropout": 0.5},
    "hunyuan_v1_dense": {},
    "apertus": {},
    "arcee": {"mlp_bias": True},
    "helium": {"head_dim": 4},
    "nanochat": {},
    "qwen3_next": LINEAR
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 13,
        "mlp_only_layers": [0, 1, 3],
    },
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 7},
    "mixtral": {"num_local_experts": 5, "intermediate_size": 40, "sliding_window": 7},
    "qwen2_moe": QWEN_MIXTURE | {"shared_expert_intermediate_size": 27},
    "qwen3_moe": QWEN_MIXTURE,
    "olmoe": FULL_HEADS | {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40},
    "gpt_oss": MIXED | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40},
    "deepseek_v2": DEEPSEEK | LATENT | {"n_shared_experts": 2},
    "deepseek_v3": DEEPSEEK | LATENT,
    "phimoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40},
    "qwen3_5_moe_text": LINEAR | QWEN_MIXTURE | {"shared_expert_intermediate_size": 27},
    "glm4_moe": DEEPSEEK | {"use_qk_norm": True},
    "dots1": DEEPSEEK,
    "ernie4_5_moe": {
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 40,
        "moe_layer_start_index": 1,
    },
    "granitemoe": SCALES | {"num_local_experts": 5, "intermediate_size": 40},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    },
    "gemma3": inside(
        MIXED | {"sliding_window": 7, "rope_parameters": None},
        VISION,
        mm_tokens_per_image=4,
        image_token_index=90,
    ),
    "gemma4": inside(GEMMA4, VISION | {"head_dim": 4}, audio_config=None, image_token_id=90),
    "mistral3": inside({"model_type": "mistral"}, VISION, image_token_index=90),
    "qwen2_vl": inside(FULL_HEADS | multimodal_rotary(1, 1, 0), QWEN_VISION, **TOKENS),
    "qwen2_5_vl": inside(FULL_HEADS | multimodal_rotary(1, 1, 0), QWEN_VISION, **TOKENS),
    "qwen3_vl": inside(
        multimodal_rotary(2, 2, 1), QWEN_VISION | {"deepstack_visual_indexes": [0]}, **TOKENS
    ),
    "qwen3_vl_moe": inside(
        QWEN_MIXTURE | multimodal_rotary(2, 2, 1),
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **TOKENS,
    ),
    "qwen3_5": inside(LINEAR, QWEN_VISION, **TOKENS),
}

# Those that stand for all of `ARCHITECTURE_CASES` where a test takes longer or asks more: fused
# projections, transposed ones, ones that go head by head (in parallel blocks, layers that return
# tuples and add in place), norms that shrink with the heads, norms and factors in front of the
# residual stream, layers without heads.
UNUSUAL = ("phi3", "gpt2", "gpt_neox", "falcon", "cohere", "gemma2", "granite", "lfm2")

CASES_AND_UNITS = [(case, unit) for case in CASES for unit in ATTENTION_UNITS]


def tiny_config(case, **changes):
    values = {"model_type": case} | SIZES | CASES[case] | changes
    return config_of(values)


def config_of(values):
    """A config of these values but those that are None; configs change the dicts given to them."""
    inner = values.get("text_config", {})
    values = values | {"text_config": {k: v for k, v in inner.items() if v is not None} or None}
    values = {key: value for key, value in values.items() if value is not None}
    return AutoConfig.for_model(**copy.deepcopy(values))


def tiny_architecture(case, dtype=torch.float32, **changes):
    """A random model of one of `ARCHITECTURE_CASES`, with the attention that it has by default."""
    values = {"model_type": case} | ARCHITECTURE_CASES[case] | changes
    if "text_config" in values:
        values["text_config"] = SIZES | values["text_config"]
    else:
        values = SIZES | values
    if values["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {values['model_type']}")
    return random_model(config_of(values), dtype=dtype)


def tiny_model(case, attn_implementation="sdpa", dtype=torch.float32, **changes):
    """A random model in eval mode; the same for the same arguments."""
    return random_model(
        tiny_config(case, **changes), dtype=dtype, attn_implementation=attn_implementation
    )


def random_model(config, **settings):
    torch.manual_seed(0)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForCausalLM if known else AutoModelForImageTextToText
    model = auto_class.from_config(config, **settings)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("_bias"):  # made as zeros (biases) or ones (norms)
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def batches(padded=True):
    """Batches of several shapes; if `padded`, with sequences of mixed length, padded at the left.

    There are more tokens than any tiny model has channels.
    """
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, length in ((8, 24), (7, 21)):
        ids = torch.randint(SIZES["vocab_size"], (rows, length), generator=generator)
        made.append({"input_ids": ids})
        if padded:
            padding = torch.randint(length // 2, (rows, 1), generator=generator)
            made[-1]["attention_mask"] = (torch.arange(length) >= padding).long()
    return made


def at_tokens(tensors, inputs):
    """One tensor [b, T, H] a batch to [tokens, H], without padding."""
    pairs = zip(tensors, inputs, strict=True)
    return torch.cat(
        [x[b.get("attention_mask", torch.ones_like(b["input_ids"])).bool()] for x, b in pairs]
    )


@torch.no_grad()
def logits(model, inputs):
    """[tokens, V], at every position that is not padding."""
    return at_tokens([model(**batch, use_cache=False).logits for batch in inputs], inputs)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def all_specs_of(model, unit="kv_group"):
    """Of each decoder layer, its groups."""
    entry = ARCHITECTURES[model.config.model_type]
    return [entry.groups(model.config, layer, unit) for layer in layers_of(model)]


def specs_of(model, unit="kv_group"):
    """The groups of the first decoder layer."""
    return all_specs_of(model, unit)[0]


def layers_of(model):
    return model.base_model.get_submodule(ARCHITECTURES[model.config.model_type].layers)


def placement_of(model):
    """The decoder layers, which work where they are."""
    return LayerPlacement(layers_of(model), torch.device("cpu"))


def state_of(model):
    """A copy of everything that a refused compression must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return type(model), model.config.to_dict(), tensors


def assert_state(model, state):
    """Type, config and, bit for bit, weights are those of `state`."""
    assert type(model) is state[0]
    assert model.config.to_dict() == state[1]
    torch.testing.assert_close(model.state_dict(), state[2], rtol=0, atol=0, equal_nan=True)
