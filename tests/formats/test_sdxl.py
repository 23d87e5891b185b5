"""Folders of SDXL: what loads, every method on the UNet, and files that diffusers reads."""
import json
import shutil

import pytest
import torch
from nets import ADAPTED
from runs import ONE_QUICK
from safetensors.torch import load_file, save_file

from formats.checkpoint import load_pretrained, save_pretrained
from formats.diffusers_files import LORA_FILE
from formats.peft import export_peft, import_peft
from methods import adapters, contract, count, inject, load, merge, save, state
from support.errors import UserError

pytest.importorskip("diffusers")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
QUICK = [method if method == "dora" else pytest.param(method, marks=pytest.mark.slow)
         for method in ADAPTED]


def inputs(model):
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    ids = torch.tensor([[20., 16, 2, 0, 16, 16]] * 2)
    return z, t, torch.randn(2, 7, 64), torch.randn(2, 32), ids


def moved(folder, method, rank=4, **own):
    """Loads the model and gives it adapters as training might leave them."""
    model = inject(load_pretrained(folder)[0], method, TARGETS, rank, alpha=6.0, **own)
    torch.manual_seed(1)
    with torch.no_grad():
        for i, layer in enumerate(adapters(model).values()):
            for name, p in layer.named_parameters():
                if p.requires_grad and name != "magnitude":
                    torch.nn.init.normal_(p, std=0.1)
            if method == "adalora":
                layer.lam[:i % len(layer.lam)] = 0          # a rank of its own, as after pruning
    return model.eval()


def difference(a, b):
    return (a - b).abs().max().item()


# ---- loading
def test_the_unet_alone_is_the_model(sdxl):
    from diffusers import StableDiffusionXLPipeline
    model, tokenizer = load_pretrained(sdxl)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert set(model.state_dict()) == {f"unet.{name}" for name in pipeline.unet.state_dict()}
    z, t, text, pooled, ids = inputs(model)
    theirs = pipeline.unet(z, t, text, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids))
    assert torch.equal(model.eval()(z, t, text, pooled, ids), theirs.sample)
    assert (model.config.side, model.config.max_positions) == (16, 77)
    assert tokenizer("cat").input_ids == pipeline.tokenizer("cat").input_ids


def test_text_and_latents_are_those_of_diffusers(sdxl):
    from diffusers import StableDiffusionXLPipeline
    model, _ = load_pretrained(sdxl)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    text, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert all(map(torch.equal, model.read("a cat"), (text, pooled)))
    photos = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = model.encode(photos)
    of_all = pipeline.vae.encode(photos).latent_dist
    assert mean.shape == (3, 4, 8, 8) and difference(mean, 0.13025 * of_all.mean) < 1e-5
    assert difference(std, 0.13025 * of_all.std) < 1e-5
    drawn = pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert difference(model.draw("a cat"), drawn) < 1e-4
    with pytest.raises(UserError, match="has 92 tokens, the model reads 77"):
        model.draw("a" * 90)


def test_the_folder_s_dtype_stays_unless_another_is_asked_for(sdxl, tmp_path):
    model, _ = load_pretrained(sdxl, torch.bfloat16)
    save_pretrained(model, tmp_path / "half")
    half = load_pretrained(tmp_path / "half")[0]
    assert half.unet.dtype == torch.bfloat16 and half.pipeline.vae.dtype == torch.float32
    assert load_pretrained(tmp_path / "half", torch.float32)[0].unet.dtype == torch.float32
    z, *others = inputs(half)
    assert half(z, *others).isfinite().all() and half.draw("a cat").isfinite().all()


@pytest.fixture
def copied(sdxl, tmp_path):
    return shutil.copytree(sdxl, tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer",
                                  "tokenizer_2", "scheduler"])
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(UserError, match=f"{part} is missing, which model_index.json promises"):
        load_pretrained(copied)
    (copied / part).mkdir()
    if not part.startswith("tokenizer"):
        with pytest.raises(UserError, match="cannot be loaded|holds neither"):
            load_pretrained(copied)


@pytest.mark.parametrize("part, file", [
    ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"), ("text_encoder_2", "model")])
def test_a_tensor_that_is_missing_or_wrong_is_named(copied, part, file):
    path = copied / part / f"{file}.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight"))
    whole = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: has no tensors .*weight"):
        load_pretrained(copied)
    save_file(tensors | {name: torch.full_like(whole, torch.nan)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: .*weight holds NaN"):
        load_pretrained(copied)
    save_file(tensors | {name: whole.new_zeros(3)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: cannot be loaded"):
        load_pretrained(copied)


@pytest.mark.parametrize("file, change, told", [
    ("model_index.json", dict(_class_name="FluxPipeline"), "_class_name is 'FluxPipeline', only"),
    ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "epsilon or v_prediction"),
    ("vae/config.json", dict(latents_mean=[0.0] * 4), "latents_mean is not read"),
    ("unet/config.json", dict(sample_size=[8, 8]), "sample_size must be a whole number")])
def test_what_is_not_read_here_is_refused_by_name(copied, file, change, told):
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        load_pretrained(copied)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_without_a_package_one_line_says_what_to_install(sdxl, monkeypatch, package):
    monkeypatch.setattr("support.errors.find_spec", lambda name: name != package or None)
    with pytest.raises(UserError, match=f"package {package} is missing: pip install -r requireme"):
        load_pretrained(sdxl)


# ---- methods on the UNet
@pytest.mark.parametrize("method", ONE_QUICK)
def test_every_method_starts_at_the_model_and_trains_adapters_alone(sdxl, method):
    model, _ = load_pretrained(sdxl)
    x = inputs(model)
    before, base = model.eval()(*x), {name: p.clone() for name, p in model.named_parameters()}
    inject(model, method, TARGETS, 4)
    assert difference(model(*x), before) < 1e-5
    assert count(model)["total"] == sum(p.numel() for p in model.parameters())
    model.train()
    first = {name: tensor.clone() for name, tensor in state(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    kind, layers = contract(model)
    kind.start(layers, 12)
    for step in range(2):
        loss = model(*x).square().mean() + kind.extra_loss(layers)
        loss.backward()
        optimizer.step()
        kind.on_step(layers, step, 12)
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if name in base or name.replace(".base", "") in base:
            assert method == "full" or torch.equal(p, base[name.replace(".base", "")]), name
    assert any(not torch.equal(tensor, first[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("method", QUICK)
def test_merging_and_saving_keep_the_output(sdxl, tmp_path, method):
    model = moved(sdxl, method)
    x = inputs(model)
    out = model(*x)
    save(model, tmp_path / "adapter.safetensors")
    again = load(load_pretrained(sdxl)[0], tmp_path / "adapter.safetensors").eval()
    assert torch.equal(again(*x), out) and len(adapters(again)) == 64
    with pytest.raises(UserError, match="has adapters, merge"):
        save_pretrained(model, tmp_path / "merged")
    assert difference(merge(model)(*x), out) < 1e-5 * max(1, out.abs().max().item())
    save_pretrained(model, tmp_path / "merged")
    from diffusers import StableDiffusionXLPipeline
    unet = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged").unet
    theirs = unet(*x[:3], added_cond_kwargs=dict(text_embeds=x[3], time_ids=x[4])).sample
    assert difference(theirs, model(*x)) < 1e-6


@pytest.mark.parametrize("method", QUICK)
def test_checkpointing_gives_the_same_gradients(sdxl, method):
    model, found = moved(sdxl, method).train(), []
    x = inputs(model)
    for on in (False, True):
        model.checkpointing = on
        assert model.checkpointing == on
        model(*x).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) >= 128
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found))


# ---- files for diffusers
def through_diffusers(sdxl, folder, x, **more):
    """Returns the output of diffusers' own UNet with the adapters that its two loaders read."""
    from diffusers import StableDiffusionXLPipeline
    outs = []
    for load_into in (lambda pipeline: pipeline.load_lora_weights(str(folder)),
                      lambda pipeline: pipeline.unet.load_lora_adapter(
                          str(folder / LORA_FILE), prefix="unet", **more)):
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
        load_into(pipeline)
        outs.append(pipeline.unet(*x[:3], added_cond_kwargs=dict(text_embeds=x[3],
                                                                 time_ids=x[4])).sample)
    assert difference(*outs) < 1e-6
    return outs[0]


@pytest.mark.parametrize("method, own", [
    ("lora", {}), ("dash", {"prelaunch": 1}), *(pytest.param(*slow, marks=pytest.mark.slow)
        for slow in (("lora", {"scaling": "rslora"}), ("lora", {"ab_init": "pissa"}), ("dora", {}),
                     ("adalora", {}), ("adalora", {"dora": True})))])
def test_diffusers_computes_what_we_do_with_our_file(sdxl, tmp_path, method, own):
    model = moved(sdxl, method, **own)
    x, plain = inputs(model), load_pretrained(sdxl)[0].eval()
    if method == "dash":
        kind, layers = contract(model)
        kind.start(layers, 4)
        for step in range(2):               # the dash begins after the first step
            model(*x).square().mean().backward()
            kind.on_step(layers, step, 4)
        for layer in layers:
            torch.nn.init.normal_(layer.coords, std=0.1)
            assert layer.Vt.any()
    out = model(*x)
    assert export_peft(model, tmp_path / "out") == {}
    assert difference(out, plain(*x)) > 1e-2
    assert difference(through_diffusers(sdxl, tmp_path / "out", x), out) < 1e-5
    ours = import_peft(load_pretrained(sdxl)[0], tmp_path / "out").eval()
    assert difference(ours(*x), out) < 1e-5
    assert ours.injected["targets"] == sorted(TARGETS)
    if method == "adalora":
        assert len(set(ours.injected["rank"].values())) > 1


@pytest.mark.parametrize("method, own, told", [
    ("loha", {}, "LoRA and DoRA alone: --to writes"), ("hira", {}, "--to writes"),
    ("dual", {}, "--to writes"), ("dual", {"dora": True}, "--to writes"),
    ("full", {}, "write the whole model")])
def test_what_has_no_such_form_names_the_way_out(sdxl, tmp_path, method, own, told):
    with pytest.raises(UserError, match=told):
        export_peft(inject(load_pretrained(sdxl)[0], method, TARGETS, 4, **own), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_dual_lora_becomes_the_best_lora_of_a_rank(sdxl, tmp_path):
    model = moved(sdxl, "dual")
    lost = export_peft(model, tmp_path / "out", rank=64)
    x = inputs(model)
    assert len(lost) == 64 and max(lost.values()) < 1e-4
    assert difference(through_diffusers(sdxl, tmp_path / "out", x), model(*x)) < 1e-3


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_of_diffusers_is_read_with_its_config(sdxl, tmp_path, use_dora):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_dora=use_dora,
                        rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 5})
    pipeline.unet.add_adapter(config)
    torch.manual_seed(1)
    for name, p in pipeline.unet.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict())
    model = import_peft(load_pretrained(sdxl)[0], tmp_path).eval()
    x = inputs(model)
    assert difference(model(*x), through_diffusers(sdxl, tmp_path, x, use_safetensors=True)) < 1e-5
    assert model.injected["method"] == ("dora" if use_dora else "lora")
    assert set(model.injected["alpha"].values()) == {7, 5}


def test_the_older_dialect_is_read(sdxl, tmp_path):
    model = moved(sdxl, "lora")
    export_peft(model, tmp_path)
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
           for name, tensor in load_file(tmp_path / LORA_FILE).items()}
    assert sum(name.endswith(".lora.down.weight") for name in old) == 64
    save_file(old, tmp_path / LORA_FILE)
    x = inputs(model)
    assert difference(through_diffusers(sdxl, tmp_path, x), model(*x)) < 1e-5
    ours = import_peft(load_pretrained(sdxl)[0], tmp_path).eval()
    assert difference(ours(*x), model(*x)) < 1e-5


@pytest.fixture
def written(sdxl, tmp_path):
    """Writes a file of adapters; returns its path and its tensors."""
    export_peft(moved(sdxl, "lora"), tmp_path)
    return tmp_path / LORA_FILE, load_file(tmp_path / LORA_FILE)


def test_a_file_with_other_tensors_is_refused_by_name(sdxl, written):
    path, tensors = written
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    partner, A = first.replace("lora_A", "lora_B"), tensors[first]
    without = {name: tensor for name, tensor in tensors.items() if name != partner}
    layer = first.removesuffix(".lora_A.weight").removeprefix("unet.")
    for change, told in (
            (tensors | {"text_encoder.x.lora_A.weight": A}, "text_encoder.x.*only a UNet's"),
            ({"lora_unet_x.lora_down.weight": A}, "lora_unet_x.*only a UNet's adapters"),
            (tensors | {f"unet.{layer}.lora.down.weight": A}, "are one tensor's names"),
            (tensors | {"unet.nowhere.lora_A.weight": A}, "no linear layer nowhere"),
            (without, f"{layer} has no lora_B"), ({}, "holds no adapters"),
            (tensors | {first: A[:, :3].contiguous()}, f"tensors of {layer} do not fit"),
            (tensors | {first: A * torch.nan}, f"{first} holds NaN"),
            (tensors | {f"unet.{layer}.lora_magnitude_vector": A[0]}, "use_dora does not fit")):
        save_file({name: t.clone() for name, t in change.items()}, path)
        with pytest.raises(UserError, match=told):
            import_peft(load_pretrained(sdxl)[0], path.parent)
    for header, told in (("[1]", "no JSON object"), ("{", "no JSON object"), ("{}", "peft_type"),
                         (json.dumps({"unet.peft_type": "LORA", "unet.r": 9,
                                      "unet.target_modules": TARGETS}), "the config's 9")):
        save_file(tensors, path, {"lora_adapter_metadata": header})
        with pytest.raises(UserError, match=told):
            import_peft(load_pretrained(sdxl)[0], path.parent)


def test_adapters_of_one_kind_of_model_do_not_go_into_another(sdxl, written, base, tmp_path):
    with pytest.raises(UserError, match="SDXL's adapters are read from pytorch_lora_weights"):
        import_peft(base[0], written[0].parent)
    text = inject(load_pretrained("data/base")[0], "lora", ["q"], 2)
    export_peft(text, tmp_path / "text")
    with pytest.raises(UserError, match="SDXL's adapters are read from pytorch_lora_weights"):
        import_peft(load_pretrained(sdxl)[0], tmp_path / "text")
