"""Makes small random checkpoints of the encoder families with transformers, to compare with."""
import functools
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, DebertaConfig, DebertaV2Config, RobertaConfig

import convert

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, LENGTH = 61, 40
SMALL = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=48)     # D = 12, so that 3 D is 6^2
DEBERTA = SMALL | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
                       position_biased_input=False)
V3 = DEBERTA | dict(position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)

CONFIGS = {
    "bert": lambda **more: BertConfig(**SMALL, **more),
    "roberta": lambda **more: RobertaConfig(
        **SMALL | dict(type_vocab_size=1, layer_norm_eps=1e-5), **more),
    "roberta with two types": lambda **more: RobertaConfig(**SMALL, **more),
    "deberta": lambda **more: DebertaConfig(**DEBERTA, **more),
    "deberta with a short reach": lambda **more: DebertaConfig(
        **DEBERTA | dict(max_relative_positions=6), **more),
    "deberta with one term": lambda **more: DebertaConfig(
        **DEBERTA | dict(pos_att_type=["c2p"]), **more),
    "deberta with positions and types": lambda **more: DebertaConfig(
        **DEBERTA | dict(position_biased_input=True, type_vocab_size=2), **more),
    "deberta-v3": lambda **more: DebertaV2Config(**V3, **more),
    "deberta-v2 without buckets": lambda **more: DebertaV2Config(
        **V3 | dict(position_buckets=-1, max_relative_positions=7), **more),
    "deberta-v2 with a reach of its own": lambda **more: DebertaV2Config(
        **V3 | dict(max_relative_positions=20), **more),
    "deberta-v2 with layers of its own": lambda **more: DebertaV2Config(
        **V3 | dict(share_att_key=False, norm_rel_ebd="none"), **more),
    "deberta-v2 with one term": lambda **more: DebertaV2Config(
        **V3 | dict(pos_att_type=["p2c"]), **more),
}
HEADS = {"base": transformers.AutoModel, "mlm": transformers.AutoModelForMaskedLM,
         "labels": transformers.AutoModelForSequenceClassification}


def random_encoder(name: str, head: str, n_labels: int = 3, std: float = 0.3):
    """Makes a transformers model in which every weight is random, those of norms and biases too."""
    config = CONFIGS[name](num_labels=n_labels)
    if head == "mlm" and "deberta" in name:
        config.legacy = False
    model = HEADS[head].from_config(config).eval()
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and "LayerNorm.weight" in key else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    return model


FOLDERS = []            # keeps the objects: a folder is deleted when its object is


@functools.cache
def encoder(name: str, head: str, n_labels: int = 3):
    """Returns the transformers model, its folder on disk, and our model read from there."""
    theirs = random_encoder(name, head, n_labels)
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="encoder"))
    folder = Path(FOLDERS[-1].name)
    theirs.save_pretrained(folder)
    return theirs, folder, convert.load_pretrained(folder)[0].eval()


def some_texts(pad: int, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws tokens, mask and types (3, length); the second text is half padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (3, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, max(1, length // 2):] = 0
    tokens[mask == 0] = pad
    types = (torch.arange(length) >= length // 3).long() * mask
    return tokens, mask, types
