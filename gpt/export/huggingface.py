"""Export for the Hugging Face library `transformers`, as GPT-2 or Llama; the library itself is not needed.

Only models for which the library computes the same logits are exported.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.core.errors import UserError
from gpt.export.fast_tokenizer import make_fast_tokenizer
from gpt.export.weights import Export
from gpt.model.checkpoint import Checkpoint
from gpt.model.config import ModelConfig
from gpt.model.positions import BASE

COMMON: Mapping[str, Any] = {"kind": "gpt", "ngram": 1, "qk_norm": False}
WEIGHT_NAME = re.compile(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers: the settings that it has, and its names for the modules.

    `blocks` is the name of the list of blocks; the names of modules in a block are relative to it.
    """

    title: str
    settings: Mapping[str, Any]
    blocks: str
    modules: Mapping[str, str]


GPT2 = Architecture(
    title="GPT-2",
    settings={**COMMON, "position": "learned", "norm": "layer", "activation": "gelu", "bias": True},
    blocks="transformer.h",
    modules={
        "token_embedding": "transformer.wte",
        "positions.table": "transformer.wpe",
        "attention_norm": "ln_1",
        "attention.query": "attn.c_attn",  # query, key and value in one matrix
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.widen": "mlp.c_fc",
        "feed_forward.output": "mlp.c_proj",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    },
)
LLAMA = Architecture(
    title="Llama",
    settings={**COMMON, "position": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},
    blocks="model.layers",
    modules={
        "token_embedding": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.widen": "mlp.up_proj",
        "feed_forward.output": "mlp.down_proj",
        "norm": "model.norm",
        "output": "lm_head",
    },
)


def huggingface_export(checkpoint: Checkpoint) -> Export:
    """Weights, config.json, generation_config.json, and a fast tokenizer.

    Raises:
        UserError: transformers cannot express the model; the message has all the settings that prevent it.
    """
    config, tokenizer = checkpoint.model, checkpoint.tokenizer
    architecture = _choose_architecture(config)
    hidden = len(checkpoint.weights["blocks.0.feed_forward.widen.weight"])
    special = {"bos_token_id": tokenizer.start_token, "eos_token_id": None, "pad_token_id": None}
    make_config = _gpt2_config if architecture is GPT2 else _llama_config
    documents = {
        "config.json": {
            **make_config(config, hidden),
            **special,
            "vocab_size": tokenizer.vocab_size,
            "dtype": "float32",
        },
        "generation_config.json": {**special, "max_length": config.block_size},
        "tokenizer.json": json.loads(make_fast_tokenizer(tokenizer).to_str()),
        # No special tokens: they would be left out of the text, and the start token is a line feed.
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
        },
    }
    return Export(_convert_weights(checkpoint, architecture), ("format", "pt"), documents)


def _choose_architecture(config: ModelConfig) -> Architecture:
    values = config.model_dump()
    differences = []
    for architecture in (GPT2, LLAMA):
        wrong = {key: wanted for key, wanted in architecture.settings.items() if values[key] != wanted}
        if not wrong:
            return architecture
        changes = (f"model.{key} {_yaml(wanted)} (found {_yaml(values[key])})" for key, wanted in wrong.items())
        differences.append(f"as {architecture.title} {', '.join(changes)}")
    raise UserError(
        f"--format huggingface: expected {'; or '.join(differences)}; "
        "train with presets/gpt2.yaml or presets/llama.yaml, or use --format safetensors"
    )


def _yaml(value: object) -> str:
    return str(value).lower()


def _gpt2_config(config: ModelConfig, hidden: int) -> dict[str, Any]:
    """The content of config.json without what both architectures have; `hidden` channels in the feed-forward layers."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": hidden,
        "n_positions": config.block_size,
        "activation_function": "gelu",  # GPT-2's own default is an approximation of it
        "layer_norm_epsilon": 1e-5,  # torch's default
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
    }


def _llama_config(config: ModelConfig, hidden: int) -> dict[str, Any]:
    """As `_gpt2_config`. Llama has no dropout of embeddings and blocks, so a fine-tuning there goes without dropout."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": hidden,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # torch's default
        "rope_parameters": {"rope_type": "default", "rope_theta": float(BASE)},
        "tie_word_embeddings": config.tie_embeddings,
    }


def _convert_weights(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, Tensor]:
    """The weights in the layout of the architecture, under its names."""
    config, weights = checkpoint.model, dict(checkpoint.weights)
    if config.tie_embeddings:
        del weights["output.weight"]
    weights = _gpt2_layout(weights) if architecture is GPT2 else _llama_layout(weights, config.n_head)
    converted = {}
    for name, weight in weights.items():
        found = WEIGHT_NAME.fullmatch(name)
        assert found
        layer, module, kind = found.groups()
        prefix = f"{architecture.blocks}.{layer}." if layer else ""
        converted[f"{prefix}{architecture.modules[module]}.{kind}"] = weight
    return converted


def _gpt2_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value in one matrix; the matrices of the blocks transposed."""
    converted = {}
    for name, weight in weights.items():
        if ".query." in name:
            converted[name] = torch.cat([weights[name.replace("query", part)] for part in ("query", "key", "value")])
        elif ".key." not in name and ".value." not in name:
            converted[name] = weight
    return {
        name: weight.T if name.startswith("blocks.") and weight.dim() == 2 else weight
        for name, weight in converted.items()
    }


def _llama_layout(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The channels of queries and keys reordered: Llama rotates channels i and i + D / 2 instead of neighbours."""
    return {
        name: weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if ".query." in name or ".key." in name
        else weight
        for name, weight in weights.items()
    }
