"""Carries a trained head for labels between a model and PEFT's files.

PEFT keeps whole modules beside the adapters, those of `modules_to_save`, under their names in the
checkpoint:
    base_model.model.classifier.weight
With task_type SEQ_CLS it adds `classifier` and `score` to the list. The first is the head of BERT,
RoBERTa and DeBERTa, the second that of decoders. BERT's and DeBERTa's heads have another layer, the
pooler. PEFT saves it only if modules_to_save names it.
"""
import copy

from torch import Tensor, nn

from encoder import Encoder
from formats.decoders import Family
from formats.huggingface import FAMILIES, map_names
from formats.tensors import few_names
from methods import whole_modules, widen
from support.errors import UserError

SEQ_CLS = {"classifier", "score"}


def head_names(family: Family) -> dict[str, str]:
    """Maps the names of a head's tensors, as the family's checkpoints have them, to ours."""
    return {f"{theirs}.{kind}": f"{ours[0]}.{kind}" for theirs, ours in family.names.items()
            for kind in ("weight", "bias") if ours[0] in ("head.dense", "head.out", "score")}


def parts_of(model: nn.Module) -> dict:
    """Copies what fit_head() may change, for put_back()."""
    return {name: copy.deepcopy(getattr(model, name)) for name in ("mlm_head", "head", "score")
            if hasattr(model, name)} | {"config": dict(vars(model.config))}


def put_back(model: nn.Module, parts: dict) -> None:
    vars(model.config).update(parts.pop("config"))
    for name, module in parts.items():
        setattr(model, name, module)


def fit_head(model: nn.Module, head: dict[str, Tensor]) -> list[str]:
    """Gives the model a head of the shape of these tensors; returns the modules that they fill.

    head: our names -> tensors. Raises UserError if a part is missing or does not fit.
    """
    if not head:
        return []
    encoder = isinstance(model, Encoder)
    out, pooled = "head.out" if encoder else "score", encoder and model.config.has_pooler
    last = head.get(f"{out}.weight")
    if last is None and model.label_head is None:
        raise UserError("the head for labels lacks its last layer, there is only "
                        + few_names(head))
    if model.label_head is None or (
            last is not None and len(last) != len(model.get_parameter(f"{out}.weight"))):
        model.add_head(len(last))
    widen(model.get_submodule(model.label_head))        # it trains on
    if encoder and not pooled and "head.dense.weight" not in head:
        raise UserError("the pooler, which is a part of the head, is neither in the adapter nor in "
                        "the model: PEFT would draw it at random")
    filled = sorted({name.rpartition(".")[0] for name in head})
    expected = {f"{module}.{name}": p for module in filled
                for name, p in model.get_submodule(module).named_parameters()}
    for name, p in expected.items():
        if name not in head or head[name].shape != p.shape:
            found = tuple(head[name].shape) if name in head else "missing"
            raise UserError(f"{name}, of the head for labels, is {found}, the model's is "
                            f"{tuple(p.shape)}")
    return filled


def saved_modules(model: nn.Module, folder) -> tuple[list[str], dict[str, Tensor]]:
    """Returns modules_to_save and their tensors, from the modules of the head that train whole.

    Raises UserError if other modules train whole, or a part of RoBERTa's head alone.
    """
    family = FAMILIES[model.config.model_type]
    whole = {f"{path}.{name}": p.detach() for path, module in whole_modules(model).items()
             for name, p in module.named_parameters()}
    theirs = {ours[0]: name for name, ours in map_names(model.config, set(whole)).items()}
    odd = {name for name in whole if theirs.get(name) not in head_names(family)}
    if odd:
        raise UserError(f"{folder}: the whole modules of {few_names(odd)} have no place in PEFT's "
                        "adapters here")
    tensors = {theirs[name]: tensor for name, tensor in whole.items()}
    modules = {name.removeprefix(family.prefix).partition(".")[0] for name in tensors}
    lost = {name for name, ours in head_names(family).items() if name not in tensors
            and ours in dict(model.named_parameters())
            and name.removeprefix(family.prefix).partition(".")[0] in modules}
    if lost:
        raise UserError(f"{folder}: PEFT would save {few_names(lost)} too, which does not train")
    return sorted(modules), tensors
