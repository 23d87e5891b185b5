import json

import pytest
import torch
from nets import ADAPTED, Block, data, injected, net, same, snapshot, train
from safetensors.torch import load_file, save_file
from torch import nn

from methods import (METHODS, adapters, contract, count, inject, load, merge, param_groups, save,
                     unmerge)
from support.errors import UserError


def test_a_target_is_the_end_of_a_path():
    assert list(adapters(injected("lora"))) == ["q", "blocks.0.q", "blocks.0.v", "blocks.1.q",
                                                "blocks.1.v"]
    for targets, found in (("o", ["blocks.0.o", "blocks.1.o"]), ("0.q", ["blocks.0.q"]),
                           (["blocks.1.q", "o"], ["blocks.0.o", "blocks.1.q", "blocks.1.o"])):
        assert set(adapters(inject(net(), "lora", targets))) == set(found)
    with pytest.raises(UserError, match="named s.0.q"):         # not a part of a name
        inject(net(), "lora", ["s.0.q"])


def test_a_module_at_two_paths_becomes_one_layer_at_both():
    model = injected("lora")
    assert model.twin["v"] is model.blocks[0].v is adapters(model)["blocks.0.v"]


def two_blocks():
    return nn.ModuleDict({"a": Block(8), "b": Block(8)})


@pytest.mark.parametrize("method", ADAPTED)
def test_each_layer_may_have_a_rank_and_an_alpha_of_its_own(method, tmp_path):
    ranks, alphas = {"a.q": 4, "a.v": 4, "b.v": 2}, {"a.q": 8, "a.v": 3, "b.v": 8}
    own = {"init_rank": 6} if method == "adalora" else {}
    model = inject(two_blocks(), method, ["a.q", "v"], ranks, alphas, **own)
    save(model, tmp_path / "file")
    for found in (model, load(two_blocks(), tmp_path / "file")):
        assert {path: layer.rank for path, layer in adapters(found).items()} == ranks
        if METHODS[method].layer.uses_alpha:
            assert {path: layer.alpha for path, layer in adapters(found).items()} == alphas


def test_dual_s_parts_follow_each_layer_s_rank():
    model = inject(two_blocks(), "dual", ["a.q", "v"], {"a.q": 4, "a.v": 4, "b.v": 2})
    assert [len(layer.A) for layer in adapters(model).values()] == [2, 2, 1]


def test_a_rank_of_each_layer_names_all_of_them_and_fits_the_options():
    with pytest.raises(UserError, match="rank: b.q is no adapted layer"):
        inject(two_blocks(), "lora", ["v"], {"a.v": 2, "b.v": 2, "b.q": 2})
    with pytest.raises(UserError, match="alpha: b.v is missing: give the full path"):
        inject(two_blocks(), "lora", ["v"], alpha={"a.v": 2})
    with pytest.raises(UserError, match="leave r1 out"):
        inject(two_blocks(), "dual", ["v"], {"a.v": 2, "b.v": 4}, r1=1)
    with pytest.raises(UserError, match="give init_rank"):      # its layers share one
        start(inject(two_blocks(), "adalora", ["v"], {"a.v": 2, "b.v": 4}))


def start(model):
    method, layers = contract(model)
    return method.start(layers, 100)


# ---- whole modules
@pytest.mark.parametrize("method", ADAPTED)
def test_whole_modules_train_beside_the_adapters_and_come_back_from_the_file(method, tmp_path):
    model = injected(method, whole=["norm", "1.o"])
    start, tokens = snapshot(model), data()[0]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "norm.bias", "blocks.1.o.weight", "blocks.1.o.bias"} == {
        name for name in trained if not name.startswith(tuple(f"{path}." for path in
                                                              adapters(model)))}
    assert count(model) == {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "whole": 8 + 8 + 128 + 8, "total": sum(p.numel() for p in model.parameters())}
    train(model)
    assert all(not torch.equal(start[name], p) for name, p in model.named_parameters()
               if name in trained)
    save(model, tmp_path / "file")
    again = load(net(), tmp_path / "file")
    assert same(snapshot(again), snapshot(model)) and again.injected["whole"] == ["1.o", "norm"]
    before = model.eval()(tokens)
    assert torch.allclose(merge(again).eval()(tokens), before, atol=1e-5)
    assert torch.equal(again.norm.weight, model.norm.weight)


def test_a_whole_module_learns_at_the_run_s_rate():
    model = injected("lora+", whole=["norm"])
    rates = {id(p): group["lr"] for group in param_groups(model, 0.01, lr_ratio=16)
             for p in group["params"]}
    assert rates[id(model.norm.weight)] == 0.01 and rates[id(model.q.B)] == 0.16


def test_a_whole_module_that_is_not_there_or_holds_an_adapter_is_refused():
    with pytest.raises(UserError, match="whole: no module is named hed: the model's are blocks"):
        injected("lora", whole=["hed"])
    with pytest.raises(UserError, match="blocks.0.q: cannot be adapted and whole at once"):
        injected("lora", whole=["blocks.0"])
    with pytest.raises(UserError, match="q: cannot be adapted and whole at once"):
        injected("lora", whole=["q"])
    with pytest.raises(UserError, match="head: cannot be adapted and whole at once"):   # tied
        inject(net(), "lora", ["head"], rank=4, whole=["embed"])
    with pytest.raises(UserError, match="make it float32 first"):
        injected("lora", torch.bfloat16, whole=["norm"])


def test_a_refused_injection_leaves_the_model_as_it_was():
    model = net()
    with pytest.raises(UserError, match="blocks.1.q: rank"):
        inject(model, "lora", ["q"], rank={"q": 4, "blocks.0.q": 4, "blocks.1.q": 10_001})
    assert all(p.requires_grad for p in model.parameters()) and not adapters(model)


def test_a_whole_module_s_tied_weight_is_stored_once_and_found_by_either_path(tmp_path):
    model = train(injected("lora", whole=["head", "embed"]))
    save(model, tmp_path / "file")
    assert same(snapshot(load(net(), tmp_path / "file")), snapshot(model))
    twin = net()
    twin.other = nn.ModuleDict({"twin": twin.norm})
    inject(twin, "lora", ["q"], rank=4, whole=["twin"])
    assert twin.norm.weight.requires_grad


def test_a_bad_number_in_a_whole_module_leaves_the_model_alone(tmp_path):
    model = injected("lora", whole=["norm"])
    save(model, tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "bad", {"adapter": json.dumps(model.injected)})
    fresh = net()
    with pytest.raises(UserError, match="norm.weight holds NaN"):
        load(fresh, tmp_path / "bad")
    assert same(snapshot(fresh), snapshot(net()))


def test_a_target_that_matches_nothing_is_refused_with_the_names_that_exist():
    model = net()
    with pytest.raises(UserError, match="named k, w: the model's are head, o, q, v$"):
        inject(model, "lora", ["q", "w", "k"])
    with pytest.raises(UserError, match="embed"):     # not an nn.Linear
        inject(model, "lora", ["embed"])
    with pytest.raises(UserError, match="nothing"):
        inject(model, "lora", [])
    assert all(p.requires_grad for p in model.parameters()) and not adapters(model)


def test_wrong_methods_and_options_are_refused():
    with pytest.raises(UserError, match="lora+"):
        inject(net(), "lroa", ["q"])
    with pytest.raises(UserError, match="dual has no option magic: its own are r1, r2"):
        inject(net(), "dual", ["q"], magic=1)
    for wrong in (dict(rank=10_001), dict(rank=True), dict(alpha="16"), dict(dropout="0.1")):
        with pytest.raises(UserError, match=f"q: {next(iter(wrong))} must be"):
            inject(net(), "lora", ["q"], **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_injecting_twice_is_refused(method):
    model = injected(method)
    for again in (model, merge(model), *([model.blocks] if method in ADAPTED else [])):
        with pytest.raises(UserError, match="already"):
            inject(again, "lora", ["o"])


def test_a_layer_alone_can_be_merged_and_unmerged():
    layer = adapters(injected("lora"))["q"]
    plain = merge(layer)
    assert type(plain) is nn.Linear and unmerge(plain) is layer


def test_dropout_and_evaluation_mode_reach_the_new_layers():
    model = inject(net().eval(), "lora", ["q"], dropout=0.3)
    assert not any(module.training for module in model.modules())
    assert adapters(model)["q"].dropout.p == 0.3


def test_the_defaults_are_the_papers_and_where_they_leave_a_choice_the_searches():
    assert METHODS["dual"].defaults == dict(r1=None, r2=None, update_warmup=5, init_share=0.01,
                                         init_std=None, clip=True, direction_lr=0.3)
    assert METHODS["lora"].defaults == dict(scaling="lora", ab_init="kaiming")
    assert METHODS["dora"].defaults == METHODS["lora"].defaults | {"norm_gradient": False}
    assert METHODS["adalora"].defaults == dict(init_rank=None, t_init=0.1, t_final=0.3, delta_t=1,
                                            beta1=0.85, beta2=0.85, gamma=0.01)
    assert METHODS["dash"].defaults == METHODS["lora"].defaults | dict(directions=8, prelaunch=100)
    assert METHODS["loha"].defaults == METHODS["hira"].defaults == {}
    assert METHODS["lora+"].lr_ratio == 16 and METHODS["lora"].lr_ratio == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_parameter_is_in_exactly_one_group(method):
    model = injected(method)
    ratio = METHODS[method].lr_ratio
    groups = param_groups(model, 0.01, weight_decay=0.1, lr_ratio=ratio)
    listed = [p for group in groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, listed)) == sorted(map(id, trainable))
    assert all(group["weight_decay"] == 0.1 for group in groups)


@pytest.mark.parametrize("method, fast", [
    ("lora", ["B"]), ("lora+", ["B"]), ("dora", ["B"]), ("dash", ["B"]), ("dual", ["B", "D"]),
    ("loha", ["B", "D"]), ("hira", ["B"])])
def test_the_ratio_speeds_up_what_the_class_declares_and_a_schedule_keeps_it(method, fast):
    model = injected(method)
    groups = param_groups(model, 0.01, lr_ratio=16)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = METHODS[method].defaults.get("direction_lr")
    for name, p in model.named_parameters():
        if p.requires_grad:
            last = name.rpartition(".")[2]
            slower = own if method == "dual" and last in "CD" else 1
            assert rates[id(p)] == pytest.approx(0.005 * slower * (16 if last in fast else 1)), name


def test_a_ratio_that_nothing_would_use_is_refused():
    assert [group["lr"] for group in param_groups(injected("full"), 0.01)] == [0.01]
    with pytest.raises(UserError, match="lr_ratio"):
        param_groups(injected("full"), 0.01, lr_ratio=4)
    with pytest.raises(UserError, match="lr_ratio"):
        param_groups(injected("adalora"), 0.01, lr_ratio=4)


def test_a_magnitude_is_asked_for_by_true_or_false():
    with pytest.raises(UserError, match="dora must be True or False, not 'no'"):
        inject(net(), "lora", ["q"], dora="no")
