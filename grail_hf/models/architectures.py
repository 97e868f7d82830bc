"""Where each architecture keeps its projections: data, one entry per model type.

An `Architecture` names the modules of a decoder layer and the config keys that hold its widths.
`Architecture.groups(config, layer, …)` resolves them against one decoder layer into `GroupSpec`s,
which everything else works with: no other file knows a model type.

`infer_architecture(model)` proposes the entry of a new type. It cannot see a factor or a clip that
a config could switch on and that the model at hand does not use, so review the entry. For example:

    ARCHITECTURES["persimmon"] = Architecture(
        "persimmon",
        attention=Attention(
            inputs=("self_attn.query_key_value",),  # one projection,
            interleaved=True,  # [query, key, value] head by head
            output="self_attn.dense",
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(inputs=("mlp.dense_h_to_4h",), linear=None, output="mlp.dense_4h_to_h"),
    )

Sections alone describe how a projection's rows belong to units (`Producer`): `[gate; up]` and
`[q; k; v]` are two and three sections, `[q, k, v]` head by head is one section with the rows of all
three. What a stock config cannot represent, or what would not compute the same, is a `Refusal`: the
block keeps its width, and the error for a setting that asks otherwise gives the reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grail_hf.config import ATTENTION, SHARED, unknown_name
from grail_hf.models.compatibility import (
    HEAD_DIM,
    OUTPUT_BIAS,
    Gguf,
    Refusal,
    Rehome,
    head_dim,
)
from grail_hf.models.schema import Architecture, Attention, Block, Experts, Mlp, Whole


def find_architecture(model_type: str) -> Architecture:
    """The entry for a config's `model_type`. Raises ValueError with the nearest known name."""
    if model_type not in ARCHITECTURES:
        where = (
            "ARCHITECTURES in grail_hf/models/architectures.py; grail_hf.infer_architecture(model) "
            "proposes its entry, for the table or to be passed as architecture"
        )
        raise unknown_name("architecture", model_type, ARCHITECTURES, where)
    return ARCHITECTURES[model_type]


def architectures_table() -> str:
    """What can be pruned in each model type, as a Markdown table."""
    lines = [
        "| model type | MLP | heads | per-layer widths | notes |",
        "|---|---|---|---|---|",
    ]
    for name, entry in ARCHITECTURES.items():
        blocks = {"MLP": entry.mlp, "heads": entry.attention}
        refused = {what: _refusals(block) for what, block in blocks.items()}
        offered = [_offered(refusals) for refusals in refused.values()]
        own = "no" if entry.per_layer or offered == ["no", "no"] else "yes"
        notes = [entry.note] if entry.note else []
        notes += [_note("nothing", refusal) for refusal in entry.refused]
        notes += [_note(f"no {what}", r) for what, refusals in refused.items() for r in refusals]
        notes += [
            _note(f"`{block.path}` stays", Refusal(block.reason))
            for block in entry.others
            if isinstance(block, Whole)
        ]
        if entry.experts:
            tied = ", shared ones the same fraction" if _tied(entry) else ""
            notes.append(
                f"experts: one width in a layer, own channels{tied}; uniform allocation alone"
            )
        if entry.per_layer:
            notes.append(_note("no per-layer widths", entry.per_layer))
        if any(block.post_norm for block in blocks.values()):
            notes.append("a norm follows each block: target `residual` means `dense`")
        if entry.rehome:
            notes.append(
                f"saved as {entry.rehome.model_type} where its own config cannot represent it"
            )
        lines.append(f"| {name} | {offered[0]} | {offered[1]} | {own} | {'; '.join(notes)} |")
    return "\n".join(lines)


def _tied(entry: Architecture) -> bool:
    return entry.shared is not None and entry.shared.width_key is None


def _refusals(block: Block) -> tuple[Refusal, ...]:
    return (Refusal(block.reason),) if isinstance(block, Whole) else block.refused


def _offered(refusals: tuple[Refusal, ...]) -> str:
    if any(not refusal.unless for refusal in refusals):
        return "no"
    return "in part" if refusals else "yes"


def _note(what: str, refusal: Refusal) -> str:
    values = " and ".join(f"`{key}={value}`" for key, value in refusal.unless.items())
    unless = f" unless {values}" if values else ""
    return f"{what}{unless}: {refusal.reason}"


HEADS_FILL_HIDDEN = Refusal("its attention assumes that heads * head_dim is the hidden size")
NORM_SPANS_HEADS = Refusal(
    "its query and key norms span all heads, so removing heads would change the others"
)
DIVIDES = "the number of heads must divide the hidden size"
RECURRENT = "its heads share a state over the sequence"
SANDWICH_ATTENTION = Attention(post_norm="post_attention_layernorm")
SANDWICH_MLP = Mlp(post_norm="post_feedforward_layernorm")
FUSED_GATE = Mlp(inputs=("mlp.gate_up_proj",), sections=2, linear="mlp.gate_up_proj")
UNGATED = Mlp(inputs=("mlp.up_proj",), linear=None)
# Their width is a multiple of the routed experts' width, from the same config key.
SHARED_EXPERTS = Mlp(
    inputs=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    linear="mlp.shared_experts.up_proj",
    output="mlp.shared_experts.down_proj",
    width_key=None,
    kind=SHARED,
)
GATED_SHARED_EXPERT = Mlp(
    inputs=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    linear="mlp.shared_expert.up_proj",
    output="mlp.shared_expert.down_proj",
    width_key="shared_expert_intermediate_size",
    kind=SHARED,
    gate="mlp.shared_expert_gate",
)
LATENT_ATTENTION = Whole(
    ATTENTION,
    "self_attn",
    "self_attn.o_proj",
    "the keys and values of all heads are computed from one latent vector",
)
LINEAR_ATTENTION = Whole(ATTENTION, "linear_attn", "linear_attn.out_proj", RECURRENT)
GEMMA4: dict[str, Any] = {
    "attention": Whole(
        ATTENTION,
        "self_attn",
        "self_attn.o_proj",
        "full and sliding layers differ in head size and share one number of heads",
        post_norm="post_attention_layernorm",
    ),
    "mlp": SANDWICH_MLP,
    "refused": (
        Refusal(
            "layers that share keys and values cannot be calibrated one at a time",
            unless={"num_kv_shared_layers": 0},
        ),
    ),
}
OWN_LAYERS = Refusal("its config has per-layer values of its own")
INNER_CONFIG = Refusal("the text decoder's config is nested in another config")
# Models that contain a text decoder: it is compressed, on text alone, and the rest is kept.
INSIDE: dict[str, Any] = {
    "layers": "language_model.layers",
    "per_layer": INNER_CONFIG,
    "note": "the text decoder alone; the rest is kept",
}
# A mistral without a sliding window is a llama without biases that accepts any number of heads.
MISTRAL = Rehome(
    "mistral",
    sets={"sliding_window": None},
    requires={"attention_bias": False, "mlp_bias": False},
)
FULL_ATTENTION = {"sliding_window": None}
# A granite is a llama with four more factors, which are 1 or the usual value here; it accepts any
# number of heads, and biases everywhere.
GRANITE = Rehome(
    "granite",
    sets={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
    requires=FULL_ATTENTION,
    derives={
        "head_dim": head_dim,
        "attention_multiplier": lambda config: head_dim(config) ** -0.5,
    },
)
GGUF_LLAMA = Gguf("llama", interleaved=True, rope_factors=True, requires=FULL_ATTENTION)
QK_NORM = "it normalises queries and keys, and a {} does not"
ENTRIES = (
    Architecture(
        "llama",
        attention=Attention(bias_key="attention_bias"),
        mlp=Mlp(bias_key="mlp_bias"),
        # A llama config refuses a head count that does not divide the hidden size.
        rehome=MISTRAL,
        exports={"mistral": MISTRAL, "granite": GRANITE},
        gguf=(GGUF_LLAMA,),
    ),
    Architecture(
        "mistral",
        exports={"mistral": replace(MISTRAL, requires=FULL_ATTENTION), "granite": GRANITE},
        gguf=(GGUF_LLAMA,),
    ),
    Architecture("ministral"),
    Architecture(
        "qwen2",
        exports={
            "mistral": "it has biases on q, k and v, and a mistral has none",
            "granite": replace(GRANITE, sets=GRANITE.sets | {"attention_bias": True}),
        },
        # llama.cpp's qwen2 fixes the number of heads; its llama accepts biases and any number.
        gguf=(Gguf("qwen2", square=True, requires=FULL_ATTENTION), GGUF_LLAMA),
        vllm_ignores=HEAD_DIM,
    ),
    Architecture(
        "qwen3",
        attention=Attention(bias_key="attention_bias"),
        exports={name: QK_NORM.format(name) for name in ("mistral", "granite")},
        gguf=(Gguf("qwen3", requires=FULL_ATTENTION | {"attention_bias": False}),),
        vllm_ignores=OUTPUT_BIAS,
    ),
    Architecture("gemma"),
    Architecture("gemma2", attention=SANDWICH_ATTENTION, mlp=SANDWICH_MLP, note=DIVIDES),
    Architecture("gemma3_text", attention=SANDWICH_ATTENTION, mlp=SANDWICH_MLP, note=DIVIDES),
    Architecture("gemma4_text", **GEMMA4, per_layer=OWN_LAYERS),
    Architecture(
        "phi",
        attention=Attention(
            output="self_attn.dense",
            refused=(
                Refusal(
                    "its query and key norms are as wide as hidden size / heads",
                    unless={"qk_layernorm": False},
                ),
            ),
        ),
        mlp=Mlp(inputs=("mlp.fc1",), linear=None, output="mlp.fc2"),
    ),
    Architecture(
        "phi3",
        attention=Attention(inputs=("self_attn.qkv_proj",)),
        mlp=FUSED_GATE,
        note="heads only without longrope, whose config takes head_dim to be hidden size / heads",
    ),
    Architecture(
        "gpt2",
        layers="h",
        attention=Attention(
            inputs=("attn.c_attn",),
            output="attn.c_proj",
            transposed=True,
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(
            inputs=("mlp.c_fc",),
            linear=None,
            output="mlp.c_proj",
            width_key="n_inner",
            transposed=True,
        ),
    ),
    Architecture(
        "gpt_neox",
        attention=Attention(
            inputs=("attention.query_key_value",),
            interleaved=True,
            output="attention.dense",
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(inputs=("mlp.dense_h_to_4h",), linear=None, output="mlp.dense_4h_to_h"),
    ),
    Architecture(
        "gptj",
        layers="h",
        attention=Attention(
            inputs=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            output="attn.out_proj",
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(inputs=("mlp.fc_in",), linear=None, output="mlp.fc_out", width_key="n_inner"),
    ),
    Architecture(
        "opt",
        layers="decoder.layers",
        attention=Attention(output="self_attn.out_proj", refused=(HEADS_FILL_HIDDEN,)),
        mlp=Mlp(inputs=("fc1",), linear=None, output="fc2", width_key="ffn_dim"),
        additive={"do_layer_norm_before": True},
    ),
    Architecture(
        "bloom",
        layers="h",
        attention=Attention(
            inputs=("self_attention.query_key_value",),
            interleaved=True,
            output="self_attention.dense",
            linear_if=None,  # its attention adds the residual stream
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(
            inputs=("mlp.dense_h_to_4h",),
            linear=None,
            output="mlp.dense_4h_to_h",
            refused=(Refusal("its MLP is always four times as wide as the hidden size"),),
        ),
    ),
    Architecture(
        "falcon",
        layers="h",
        attention=Attention(
            inputs=("self_attention.query_key_value",),
            interleaved=True,
            output="self_attention.dense",
            refused=(HEADS_FILL_HIDDEN,),
        ),
        mlp=Mlp(
            inputs=("mlp.dense_h_to_4h",),
            linear=None,
            output="mlp.dense_4h_to_h",
            width_key="ffn_hidden_size",
        ),
    ),
    Architecture("starcoder2", mlp=Mlp(inputs=("mlp.c_fc",), linear=None, output="mlp.c_proj")),
    Architecture("stablelm", attention=Attention(refused=(HEADS_FILL_HIDDEN,))),
    Architecture("olmo", attention=Attention(linear_if={"clip_qkv": None})),
    *(
        Architecture(
            name,
            attention=replace(SANDWICH_ATTENTION, refused=(NORM_SPANS_HEADS,)),
            mlp=SANDWICH_MLP,
            others=others,
        )
        for name, others in {
            "olmo2": (),
            "olmo3": (),
            "olmo_hybrid": (replace(LINEAR_ATTENTION, output="linear_attn.o_proj"),),
        }.items()
    ),
    Architecture("granite", residual_scale_key="residual_multiplier"),
    Architecture("smollm3"),
    Architecture(
        "cohere", attention=Attention(head_norms=("self_attn.q_norm", "self_attn.k_norm"))
    ),
    Architecture("cohere2"),
    Architecture("glm", mlp=FUSED_GATE),
    Architecture(
        "glm4",
        attention=Attention(post_norm="post_self_attn_layernorm"),
        mlp=replace(FUSED_GATE, post_norm="post_mlp_layernorm"),
    ),
    Architecture("exaone4", attention=SANDWICH_ATTENTION, mlp=SANDWICH_MLP),
    Architecture("nemotron", mlp=UNGATED),
    Architecture("ernie4_5"),
    Architecture("seed_oss"),
    Architecture("hunyuan_v1_dense"),
    Architecture("apertus", mlp=UNGATED),
    Architecture("arcee", mlp=UNGATED, note=DIVIDES),
    Architecture("helium", attention=Attention(refused=(HEADS_FILL_HIDDEN,))),
    Architecture("nanochat", mlp=Mlp(inputs=("mlp.fc1",), linear=None, output="mlp.fc2")),
    Architecture(
        "qwen3_next",
        attention=Attention(query_rows=2),
        experts=Experts(),
        shared=GATED_SHARED_EXPERT,
        shared_first=True,
        others=(LINEAR_ATTENTION,),
    ),
    Architecture("qwen3_5_text", attention=Attention(query_rows=2), others=(LINEAR_ATTENTION,)),
    Architecture(
        "lfm2",
        attention=Attention(output="self_attn.out_proj"),
        mlp=Mlp(
            inputs=("feed_forward.w1", "feed_forward.w3"),
            linear="feed_forward.w3",
            output="feed_forward.w2",
            pins={"block_auto_adjust_ff_dim": False},
        ),
        others=(Whole(ATTENTION, "conv", "conv.out_proj", "a short convolution has no heads"),),
        vllm_ignores=HEAD_DIM,
    ),
    Architecture("mixtral", experts=Experts(width_key="intermediate_size")),
    Architecture(
        "qwen2_moe",
        experts=Experts(),
        shared=GATED_SHARED_EXPERT,
        shared_first=True,
        vllm_ignores=HEAD_DIM,
    ),
    Architecture("qwen3_moe", experts=Experts()),
    Architecture(
        "olmoe",
        attention=Attention(refused=(NORM_SPANS_HEADS,)),
        experts=Experts(width_key="intermediate_size"),
    ),
    Architecture(
        "gpt_oss",
        attention=Attention(sinks="self_attn.sinks"),
        experts=Experts(
            router="mlp.router", interleaved=True, transposed=True, width_key="intermediate_size"
        ),
    ),
    *(
        Architecture(name, attention=LATENT_ATTENTION, experts=Experts(), shared=SHARED_EXPERTS)
        for name in ("deepseek_v2", "deepseek_v3")
    ),
    Architecture("phimoe", experts=Experts(router="mlp.router", width_key="intermediate_size")),
    Architecture(
        "qwen3_5_moe_text",
        attention=Attention(query_rows=2),
        experts=Experts(),
        shared=GATED_SHARED_EXPERT,
        shared_first=True,
        others=(LINEAR_ATTENTION,),
    ),
    *(
        Architecture(name, experts=Experts(), shared=SHARED_EXPERTS)
        for name in ("glm4_moe", "dots1")
    ),
    Architecture("ernie4_5_moe", experts=Experts(), shared=SHARED_EXPERTS, shared_first=True),
    Architecture(
        "granitemoe",
        experts=Experts(
            path="block_sparse_moe.experts",
            router="block_sparse_moe.router",
            width_key="intermediate_size",
        ),
        residual_scale_key="residual_multiplier",
        vllm_ignores=HEAD_DIM,
    ),
    Architecture(
        "lfm2_moe",
        attention=Attention(output="self_attn.out_proj"),
        mlp=Mlp(
            inputs=("feed_forward.w1", "feed_forward.w3"),
            linear="feed_forward.w3",
            output="feed_forward.w2",
        ),
        experts=Experts(path="feed_forward.experts", router="feed_forward.gate"),
        others=(Whole(ATTENTION, "conv", "conv.out_proj", "a short convolution has no heads"),),
        vllm_ignores=HEAD_DIM,
    ),
    Architecture("gemma3", attention=SANDWICH_ATTENTION, mlp=SANDWICH_MLP, **INSIDE),
    Architecture("gemma4", **GEMMA4, **INSIDE),
    Architecture("mistral3", **INSIDE),
    Architecture("qwen2_vl", attention=Attention(refused=(HEADS_FILL_HIDDEN,)), **INSIDE),
    Architecture("qwen2_5_vl", attention=Attention(refused=(HEADS_FILL_HIDDEN,)), **INSIDE),
    Architecture("qwen3_vl", **INSIDE),
    Architecture("qwen3_vl_moe", experts=Experts(), **INSIDE),
    Architecture(
        "qwen3_5", attention=Attention(query_rows=2), others=(LINEAR_ATTENTION,), **INSIDE
    ),
)
ARCHITECTURES: dict[str, Architecture] = {entry.model_type: entry for entry in ENTRIES}
