"""Makes small random checkpoints of every family with transformers, to compare with."""
import functools
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import (AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

import convert

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 97
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=1, eos_token_id=2)
GPT2_SMALL = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                  bos_token_id=1, eos_token_id=2)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 9.0]}

CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2_SMALL),
    "gpt2 with its own n_inner": lambda: GPT2Config(
        **GPT2_SMALL, n_inner=40, activation_function="gelu_pytorch_tanh"),
    "llama": lambda: LlamaConfig(**SMALL),
    "llama 1": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama with a tied head": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, head_dim=16),
    "llama 3.1": lambda: LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3_ROPE)),
    "llama with linear rope": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0}),
    "llama with dynamic rope": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    "llama with longrope": lambda: LlamaConfig(**SMALL, rope_parameters=dict(LONGROPE)),
    "mistral": lambda: MistralConfig(**SMALL, head_dim=16, sliding_window=None),
    "mistral with a window": lambda: MistralConfig(**SMALL, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2 with yarn": lambda: Qwen2Config(**SMALL, rope_parameters=dict(YARN)),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
    "qwen3 with a window": lambda: Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=48, max_window_layers=1),
}


def random_model(name: str):
    """Makes a transformers model in which every weight is random, those of norms and biases too.

    So no tensor in the wrong place goes unseen. The weights are large, so that the model writes
    many different tokens.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.2 if any(word in key for word in ("wte", "wpe", "embed", "head")) else 0.5
            torch.nn.init.normal_(parameter, std=std)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.2)
    return model


FOLDERS = []            # keeps the objects: a folder is deleted when its object is


@functools.cache
def checkpoint(name: str):
    """Returns the transformers model, its folder on disk, and our model read from there."""
    theirs = random_model(name)
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="checkpoint"))
    folder = Path(FOLDERS[-1].name)
    theirs.save_pretrained(folder)
    ours, _ = convert.load_pretrained(folder)
    return theirs, folder, ours


def some_tokens(batch: int = 3, length: int = 20) -> torch.Tensor:
    """Draws tokens (batch, length), without the special tokens 0, 1, 2."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
