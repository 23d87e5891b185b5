"""Makes what the bench compares with: peft's adapters, and transformers' model of our weights.

Both packages are optional and take seconds to import, so that happens at their first use.
"""
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Callable

import torch
from torch import nn

from experiments import costs
from experiments.contenders import RANK, Contender
from formats.checkpoint import save_pretrained
from model import Transformer

PACKAGES = ("peft", "transformers")
INSTALLED = all(find_spec(name) for name in PACKAGES)
VERSIONS = {name: version(name) if INSTALLED else None for name in PACKAGES}
PEFT = [f"peft {name}" for name in ("lora", "dora", "adalora", "loha", "hira")] * INSTALLED


def adapted_by_peft(model: nn.Module, name: str, targets: list[str], rank: int = RANK) -> nn.Module:
    """Adapts a model with an adapter of peft's; its LoHa's r is half of ours."""
    import peft
    common = dict(target_modules=targets, lora_alpha=2 * rank)
    if name == "peft loha":
        config = peft.LoHaConfig(r=rank // 2, alpha=2 * rank, target_modules=targets)
    elif name == "peft hira":
        config = peft.HiraConfig(r=rank, target_modules=targets)
    elif name == "peft adalora":
        config = peft.AdaLoraConfig(init_r=costs.start_rank(rank), target_r=rank, total_step=1000,
                                    tinit=100, tfinal=300, deltaT=1, orth_reg_weight=0.1, **common)
    else:
        config = peft.LoraConfig(r=rank, use_dora=name == "peft dora", **common)
    return peft.get_peft_model(model, config)


def model_of_peft(pretrained: Transformer, name: str, tokens: torch.Tensor,
                  bf16: bool = False) -> Contender:
    """Makes a contender of transformers' model with peft's adapters, on the same weights."""
    model = adapted_by_peft(in_transformers(pretrained).to(tokens.device), name,
                            ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    read, gold = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss(model):        # use_cache=False: training needs no cache
        return model(input_ids=read, labels=gold, shift_labels=gold, use_cache=False).loss

    return Contender(model, loss, [read, gold], bf16=bf16)


def in_transformers(model: nn.Module, kind: str = "AutoModelForCausalLM") -> nn.Module:
    """Loads the same weights into transformers' class, which its class `kind` finds."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return load_in_transformers(folder, kind, dtype=model.embed.weight.dtype)


def load_in_transformers(folder: str, kind: str = "AutoModelForCausalLM", **options) -> nn.Module:
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    return getattr(transformers, kind).from_pretrained(folder, **options)


def generation_of_transformers(model: Transformer, prompts: torch.Tensor, n: int) -> Callable:
    """Makes a call that generates n greedy tokens after the prompts with transformers."""
    theirs = in_transformers(model).to(prompts.device).eval()
    theirs.generation_config.eos_token_id = None        # generates n tokens whatever they are
    settings = dict(attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=n,
                    pad_token_id=0)

    def call():
        with torch.inference_mode():
            theirs.generate(prompts, **settings)

    return call
