import json

import pytest
import torch
from nets import ADAPTED, data, injected, net, same, snapshot, train
from safetensors.torch import load_file, save_file
from torch import nn

from methods import METHODS, load, merge, save, unmerge
from support.errors import UserError


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_round_trip(method, tmp_path):
    model, (tokens, _) = train(injected(method)), data()
    save(model, tmp_path / "adapter.safetensors")
    again = load(net(seed=0 if method in ADAPTED else 5), tmp_path / "adapter.safetensors")
    assert same(snapshot(again), snapshot(model)) and again.injected == model.injected
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()]
    save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_its_settings_and_what_trains_and_no_more(method, tmp_path):
    from safetensors import safe_open
    model = injected(method)
    save(model, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert list(metadata) == ["adapter"]
    settings = json.loads(metadata["adapter"])
    assert metadata["adapter"] == json.dumps(settings, sort_keys=True)
    assert settings["method"] == method
    if method in ADAPTED:
        assert (settings["targets"], settings["rank"]) == (["q", "v"], 4)
        assert set(METHODS[method].defaults) <= set(settings)
        assert not any("base" in name for name in names)
    else:
        assert len(names) == len(list(model.parameters()))     # the tied weight is there once


def unfit(tmp_path, method):
    """Writes files that do not fit; returns name -> path."""
    good = tmp_path / "good"
    save(injected(method), good)
    tensors = load_file(good)
    name, tensor = next(iter(tensors.items()))
    rest = {k: v for k, v in tensors.items() if k != name}
    settings = json.dumps(injected(method).injected)

    def write(title, tensors, metadata):
        save_file(tensors, tmp_path / title, metadata)

    write("missing", rest, {"adapter": settings})
    write("unexpected", tensors | {"other": tensor.clone()}, {"adapter": settings})
    write("misshapen", rest | {name: tensor[..., None].clone()}, {"adapter": settings})
    write("whole numbers", rest | {name: tensor.long()}, {"adapter": settings})
    write("truth values", rest | {name: tensor.bool()}, {"adapter": settings})
    write("foreign", tensors, {"format": "pt"})
    write("bare", tensors, None)
    write("no json", tensors, {"adapter": "{"})
    if method != "full":                    # which has no rank
        write("a list as rank", tensors, {"adapter": settings.replace('"rank": 4', '"rank": [1]')})
    write("a list", tensors, {"adapter": "[]"})
    write("unknown method", tensors, {"adapter": '{"method": "magic"}'})
    write("unknown option", tensors, {"adapter": settings[:-1] + ', "magic": 1}'})
    (tmp_path / "truncated").write_bytes(good.read_bytes()[:-1])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not a safetensors file, though long enough for a header")
    (tmp_path / "folder").mkdir()
    return [path for path in sorted(tmp_path.iterdir()) if path != good] + [tmp_path / "absent"]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_does_not_fit_is_refused_by_name_and_leaves_the_model_alone(method, tmp_path):
    for path in unfit(tmp_path, method):
        model = net(seed=3)
        model.embed.weight.requires_grad_(False)
        start, modules = snapshot(model), dict(model.named_modules())
        with pytest.raises(UserError) as error:
            load(model, path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert same(snapshot(model), start) and dict(model.named_modules()) == modules
        assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (
            len(list(model.parameters())) - 1)
        load(model, tmp_path / "good")       # nothing of the failure is left in the way


@pytest.mark.parametrize("method", METHODS)
def test_a_run_s_folder_stands_for_its_adapter_and_other_floats_are_cast(method, tmp_path):
    model = train(injected(method))
    save(model, tmp_path / "adapter.safetensors")
    assert same(snapshot(load(net(), tmp_path)), snapshot(model))
    tensors = {name: t.half() for name, t in load_file(tmp_path / "adapter.safetensors").items()}
    save_file(tensors, tmp_path / "half", {"adapter": json.dumps(model.injected)})
    found = snapshot(load(net(), tmp_path / "half"))
    assert all(torch.allclose(found[name], t, atol=1e-2, rtol=1e-2) and t.dtype is found[name].dtype
               for name, t in snapshot(model).items())


def test_a_file_for_another_model_is_refused(tmp_path):
    save(injected("lora"), tmp_path / "file")
    with pytest.raises(UserError, match="named q, v: the model's are a"):
        load(nn.Sequential(nn.ModuleDict({"a": nn.Linear(8, 8)})), tmp_path / "file")


def test_a_merged_a_plain_and_an_unwritable_model_are_not_saved(tmp_path):
    with pytest.raises(UserError, match="inject"):
        save(net(), tmp_path / "file")
    model = injected("lora")
    merge(model.blocks)
    with pytest.raises(UserError, match="unmerge"):
        save(model, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        save(unmerge(model), tmp_path)
