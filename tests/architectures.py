"""Tiny checkpoints of many architectures with random weights, made by transformers from a configuration."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_tokenizers
from tiny_tokenizers import VOCABULARY

__all__ = ["ARCHITECTURES", "Architecture", "write_checkpoint"]

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
    # with random weights of the usual size a model would hardly look at its input
    "initializer_range": 0.1,
}
_MOE = {"moe_intermediate_size": 64, "num_experts_per_tok": 2, "norm_topk_prob": True}
_GEMMA = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "hidden_activation": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        config: class of transformers that configures it.
        model: class of transformers that makes it.
        name: general.architecture of the GGUF file.
        tokenizer: writes the tokenizer's files into a folder.
        spiking: matrices that become SPK4, those of all experts of a layer together counted once.
        options: of the configuration, where they differ from those of the others.
    """

    config: str
    model: str
    name: str
    tokenizer: Callable[[Path], None]
    spiking: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_causal(self) -> bool:
        """Whether it predicts tokens; else it embeds them."""
        return self.model.endswith("ForCausalLM")


_SPM, _BPE, _WORDPIECE = tiny_tokenizers.sentencepiece, tiny_tokenizers.bpe, tiny_tokenizers.wordpiece

ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", "LlamaForCausalLM", "llama", _SPM, 14),
    "Mistral": Architecture("MistralConfig", "MistralForCausalLM", "llama", _SPM, 14),
    "Qwen2": Architecture(
        "Qwen2Config", "Qwen2ForCausalLM", "qwen2", _BPE, 14, {"tie_word_embeddings": True}
    ),
    "Qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", "qwen3", _BPE, 14, {"head_dim": 64}),
    "Gemma 2": Architecture(
        "Gemma2Config", "Gemma2ForCausalLM", "gemma2", _SPM, 14, {**_GEMMA, "tie_word_embeddings": True}
    ),
    "Gemma 3": Architecture(
        "Gemma3TextConfig", "Gemma3ForCausalLM", "gemma3", _SPM, 14, {**_GEMMA, "tie_word_embeddings": True}
    ),
    "Phi-3": Architecture("Phi3Config", "Phi3ForCausalLM", "phi3", _SPM, 8, {"sliding_window": None}),
    "GPT-NeoX": Architecture(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        "gptneox",
        _BPE,
        8,
        {"rotary_pct": 0.5, "num_key_value_heads": 4},
    ),
    "Falcon": Architecture(
        "FalconConfig",
        "FalconForCausalLM",
        "falcon",
        _BPE,
        8,
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "bias": False,
            "alibi": False,
            "ffn_hidden_size": 512,
        },
    ),
    "StableLM": Architecture("StableLmConfig", "StableLmForCausalLM", "stablelm", _BPE, 14),
    "OLMo 2": Architecture("Olmo2Config", "Olmo2ForCausalLM", "olmo2", _BPE, 14),
    "Granite": Architecture(
        "GraniteConfig",
        "GraniteForCausalLM",
        "granite",
        _BPE,
        14,
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "Mixtral": Architecture(
        "MixtralConfig",
        "MixtralForCausalLM",
        "llama",
        _SPM,
        14,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "qwen2moe",
        _BPE,
        20,
        {**_MOE, "norm_topk_prob": False, "num_experts": 4, "shared_expert_intermediate_size": 128},
    ),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        _BPE,
        14,
        {**_MOE, "num_experts": 4, "head_dim": 64},
    ),
    "BERT": Architecture(
        "BertConfig", "BertModel", "bert", _WORDPIECE, 12, {"type_vocab_size": 2, "num_key_value_heads": 4}
    ),
}


def write_checkpoint(architecture: Architecture, folder: Path, seed: int = 0, **options: Any) -> Any:
    """Writes a checkpoint folder of float32 weights; returns the model (of torch, for evaluation).

    options: of the configuration, before those of the architecture.
    """
    import torch
    import transformers

    folder.mkdir(parents=True)
    architecture.tokenizer(folder)
    config = getattr(transformers, architecture.config)(**{**_COMMON, **architecture.options, **options})
    torch.set_num_threads(1)  # threads cost more than they save here
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases as trained models have them, not all ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model.save_pretrained(folder)
    return model
