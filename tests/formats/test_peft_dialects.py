"""Adapters in every form that PEFT applies give its logits; what it ignores is refused."""
import copy
import json
import shutil
import time
import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import BASE
from reference import checkpoint, some_tokens
from runs import refused
from safetensors.torch import load_file, save_file

import convert
from formats.checkpoint import load_pretrained
from formats.peft import export_peft, import_peft
from formats.peft_files import PeftConfig
from methods import adapters, inject, load, save
from support.errors import UserError

LLAMA, GPT2 = "llama with a tied head", "gpt2"
KINDS = {"lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
         "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "o_proj"]),
         "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2,
                                       target_modules=["q_proj", "v_proj"]),
         "wide": peft.LoraConfig(r=70, use_rslora=True, target_modules=["q_proj", "k_proj"]),
         "fused": peft.LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])}


def family_of(kind: str) -> str:
    return GPT2 if kind == "fused" else LLAMA


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) -> the folder of an adapter that PEFT saved, after some training."""
    top, made = tmp_path_factory.mktemp("adapters"), set()

    def saved(kind: str) -> Path:
        if kind not in made:
            made.add(kind)
            torch.manual_seed(0)
            model = peft.get_peft_model(copy.deepcopy(checkpoint(family_of(kind))[0]),
                                        copy.deepcopy(KINDS[kind]))
            for name, p in model.named_parameters():
                if "magnitude" in name:
                    p.data.mul_(1 + 0.1 * torch.rand_like(p))
                elif "lora_" in name:
                    p.data.normal_(std=0.2)
            model.save_pretrained(top / kind)
        return top / kind
    return saved


def changed(folder: Path, to: Path, tensors=lambda found: found, **config) -> Path:
    """Copies an adapter, with changed tensors and config."""
    shutil.copytree(folder, to)
    found = tensors(load_file(folder / "adapter_model.safetensors"))
    save_file({name: t.clone() for name, t in found.items()}, to / "adapter_model.safetensors")
    raw = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(raw | config))
    return to


def fresh(family: str):
    return load_pretrained(checkpoint(family)[1])[0].eval()


@torch.no_grad()
def logits(kind: str, folder: Path | None, base=None):
    """Returns PEFT's logits; folder None: without adapters."""
    theirs = copy.deepcopy(checkpoint(family_of(kind))[0])
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of keys that it ignores
            theirs = peft.PeftModel.from_pretrained(theirs, folder)
    return theirs.eval()(some_tokens()).logits


@torch.no_grad()
def assert_read_as_peft_does(kind: str, folder: Path):
    ours, theirs = import_peft(fresh(family_of(kind)), folder)(some_tokens()), logits(kind, folder)
    assert torch.allclose(ours, theirs, atol=2e-4, rtol=2e-4), (ours - theirs).abs().max()
    assert not torch.allclose(theirs, logits(kind, None), atol=1e-3)


def renamed(old: str, new: str):
    return lambda found: {name.replace(old, new): t for name, t in found.items()}


@pytest.mark.parametrize("kind, old, new", [
    ("lora", ".weight", ".default.weight"), ("fused", ".weight", ".default.weight"),
    ("dora", "lora_A.weight", "lora_A.default.weight"),
    ("dora", "magnitude_vector", "magnitude_vector.weight"),
    ("dora", "magnitude_vector", "magnitude_vector.default.weight"),
    ("adalora", "lora_E", "lora_E.default"), ("adalora", "lora_A", "lora_A.default"),
    ("wide", "none", "none")])
def test_names_with_the_adapters_name_in_them_are_read(kind, old, new, saved, tmp_path):
    assert_read_as_peft_does(kind, changed(saved(kind), tmp_path / "x", renamed(old, new)))


@pytest.mark.parametrize("kind, old, new, said", [
    ("lora", ".weight", ".mine.weight", "its name must end in lora_[AB].weight"),
    ("lora", ".weight", "", "its name must end in lora_[AB].weight"),
    ("adalora", "lora_E", "lora_E.mine", "its name must end in lora_E"),
    ("adalora", "lora_B", "lora_B.weight", "its name must end in lora_B"),
    ("dora", "magnitude_vector", "magnitude_vector.default", "must end in lora_magnitude_vector"),
    ("lora", "base_model.", "_orig_mod.base_model.", "torch.compile: take `_orig_mod.` out"),
    ("lora", "base_model.model.", "base_model.model._orig_mod.", "torch.compile"),
    ("lora", "q_proj.", "q_proj._orig_mod.", "torch.compile"),
    ("lora", "base_model.", "module.base_model.", "DistributedDataParallel: take `module.`"),
    ("lora", "base_model.model.", "base_model.model._fsdp_wrapped_module.", "FSDP"),
    ("lora", "base_model.model.", "", "does not begin with base_model.model.")])
def test_names_that_peft_ignores_are_refused_with_the_reason(kind, old, new, said, saved, tmp_path):
    folder = changed(saved(kind), tmp_path / "x", renamed(old, new))
    assert not torch.allclose(logits(kind, folder), logits(kind, saved(kind)), atol=1e-3)
    with pytest.raises(UserError, match=f"PEFT would ignore .*{said}"):
        import_peft(fresh(family_of(kind)), folder)


def test_names_of_a_model_without_head_are_read_unless_a_module_has_two(saved, tmp_path):
    short = renamed("base_model.model.model.", "base_model.model.")
    folder = changed(saved("lora"), tmp_path / "short", short, alpha_pattern={"^layers.0.*": 9})
    same = changed(saved("lora"), tmp_path / "same", alpha_pattern={"^model.layers.0.*": 9})
    with torch.no_grad():
        assert torch.allclose(import_peft(fresh(LLAMA), folder)(some_tokens()),
                              logits("lora", same), atol=2e-4, rtol=2e-4)
    for name, other in (("short and long", short), ("default", renamed(".w", ".default.w"))):
        both = changed(saved("lora"), tmp_path / name, lambda found: found | other(found))
        with pytest.raises(UserError, match="lora_A.*weight and base_.*are one tensor's names"):
            import_peft(fresh(LLAMA), both)


# ---- copies of the model's own weights

def copies(found: dict) -> dict:
    weights = checkpoint(LLAMA)[0].state_dict()
    embed = weights["model.embed_tokens.weight"]
    q = "model.layers.0.self_attn.q_proj"
    return found | {"base_model.model.model.embed_tokens.weight": embed,
                    "base_model.model.lm_head.weight": embed.double(),
                    "base_model.model.model.norm.weight": weights["model.norm.weight"],
                    f"base_model.model.{q}.base_layer.weight": weights[f"{q}.weight"]}


def test_untouched_copies_are_skipped(saved, tmp_path):
    assert_read_as_peft_does("lora", changed(saved("lora"), tmp_path / "x", copies))
    to_save = changed(saved("lora"), tmp_path / "y", copies, modules_to_save=["lm_head"])
    assert_read_as_peft_does("lora", to_save)
    wrapped = renamed("lm_head.", "lm_head.modules_to_save.default.")
    original = renamed("lm_head.", "lm_head.original_module.")
    folder = changed(saved("lora"), tmp_path / "z",
                     lambda found: wrapped(copies(found)) | original(copies(found)))
    assert_read_as_peft_does("lora", folder)
    with torch.no_grad():                                   # in PEFT it would round the model's
        half = changed(saved("lora"), tmp_path / "half", lambda found: found | {
            name: t.bfloat16() for name, t in copies({}).items()})
        assert torch.allclose(import_peft(fresh(LLAMA), half)(some_tokens()),
                              logits("lora", saved("lora")), atol=2e-4, rtol=2e-4)
    conv = {f"base_model.model.transformer.{name}": t
            for name, t in checkpoint(GPT2)[0].transformer.state_dict().items()}
    as_peft = {name.replace(f"{conv1d}.", f"{conv1d}.base_layer."): t for name, t in conv.items()
               for conv1d in ["c_attn" if "c_attn" in name else "c_fc"]}
    folder = changed(saved("fused"), tmp_path / "full", lambda found: found | as_peft)
    assert_read_as_peft_does("fused", folder)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.norm",
                                  "model.layers.0.self_attn.q_proj.base_layer"])
def test_trained_copies_are_refused_since_peft_loads_them(name, saved, tmp_path):
    key = f"base_model.model.{name}.weight"
    folder = changed(saved("lora"), tmp_path / "x",
                     lambda found: found | {key: copies({})[key] * 1.5})
    assert not torch.allclose(logits("lora", folder), logits("lora", saved("lora")), atol=1e-3)
    with pytest.raises(UserError, match=f"{name}.weight: not the model's own weight"):
        import_peft(fresh(LLAMA), folder)


@pytest.mark.parametrize("tensors, config, said", [
    ({"foo.bar": torch.ones(3)}, {}, "foo.bar: neither an adapter nor a weight"),
    ({"base_model.model.lm_head.weight": torch.ones(99, 32)}, {}, "lm_head.weight: not the model"),
    ({"base_model.model.lm_head.weight": torch.ones(97, 32).int()}, {}, "lm_head.weight: not the"),
    ({"base_model.model.model.layers.0.self_attn.q_proj.lora_E.weight": torch.ones(4, 1)}, {},
     "lora_E is not read in an adapter of peft_type LORA"),
    ({}, dict(peft_type="ADALORA"), "its name must end in lora_A, or in lora_A.default"),
    ({}, dict(modules_to_save=["lm_head"]), "modules_to_save lm_head"),
    ({}, dict(modules_to_save="lm_head"), "modules_to_save must be a list"),
    ({}, dict(r=5), "PEFT would refuse the tensors of .*: their rank is 4, the config's 5"),
    ({}, dict(rank_pattern={"layers.1.*v_proj": 2}), "layers.1.self_attn.v_proj: their rank is 4"),
    ({}, dict(target_modules=["q_proj"]), "PEFT would ignore the tensors of .*v_proj"),
    ({}, dict(target_modules=r".*\.[01]\..*q_proj"), "PEFT would ignore the tensors of .*v_proj"),
    ({}, dict(exclude_modules=["layers.1.self_attn.q_proj"]), "layers.1.self_attn.q_proj"),
    ({}, dict(target_modules=None), "target_modules must name the adapted modules"),
    ({}, dict(use_dora=True), "use_dora does not fit .*no lora_magnitude_vector"),
    ({}, dict(layers_to_transform=[0]), r"layers\.1\..*layers_to_transform"),
    ({}, dict(layers_to_transform=1), r"layers\.0\..*layers_to_transform"),
    ({}, dict(target_modules=[3]), "target_modules must be a list of names")])
def test_what_peft_ignores_or_refuses_is_refused(tensors, config, said, saved, tmp_path):
    folder = changed(saved("lora"), tmp_path / "x", lambda found: found | tensors, **config)
    with pytest.raises(UserError, match=said):
        import_peft(fresh(LLAMA), folder)


def test_a_module_is_adapted_where_peft_adapts_it(tmp_path):
    """An exact name counts whatever the layers are. A module to save is never adapted."""
    raw = dict(peft_type="LORA", r=4, layers_to_transform=[1],
               target_modules=["model.layers.0.self_attn.q_proj", "v_proj"])
    config = PeftConfig(tmp_path, raw)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"):
        config.check_module(module, 4)
    with pytest.raises(UserError, match="layers_to_transform"):
        config.check_module("model.layers.0.self_attn.v_proj", 4)
    raw["modules_to_save"] = ["self_attn"]
    with pytest.raises(UserError, match="modules_to_save"):
        config.check_module("model.layers.1.self_attn.v_proj", 4)


# ---- patterns

@pytest.mark.parametrize("config", [
    dict(alpha_pattern={r".*\.layers\.1\..*(q_proj|v_proj)$": 64}),
    dict(alpha_pattern={"q_proj": 30, r"layers\.0\..*": 3, "v.proj": 50}),      # the first counts
    dict(alpha_pattern={r"(?:model\.)?layers\.\d{1,2}\.self_attn\.[qk]_proj": 20}),
    dict(alpha_pattern={"proj": 50, "elf_attn.q_proj": 50, "v_proj$": 12}),     # whole parts only
    dict(alpha_pattern={"^model.layers.0.+": 12, r"(layers)\.1.*\3?": 40}),
    dict(target_modules="(?i).*[QV]_PROJ", rank_pattern={".*": 4}, r=9),
    dict(target_modules="all-linear"), dict(target_modules=["self_attn.q_proj", "v_proj"])])
def test_patterns_match_as_in_peft(config, saved, tmp_path):
    assert_read_as_peft_does("lora", changed(saved("lora"), tmp_path / "x", **config))


@pytest.mark.parametrize("pattern", [
    "(", "*", "[a-z", "(?P<x>a)(?P<x>b)", "(" * 5000, "((a{999}){999}){999}", "a{100000000}",
    "x{0}((a{1000}){1000}){1000}", "((a{2000,}){2000,}){2000,}", "a{" + "9" * 5000 + "}",
    pytest.param(r"(?:\w|\.|[a-z]|[^!])+(?<=!)", marks=pytest.mark.slow)])
def test_a_pattern_that_is_none_or_takes_too_long_is_one_line_within_seconds(pattern, saved,
                                                                            tmp_path):
    folder = changed(saved("lora"), tmp_path / "x", alpha_pattern={pattern: 3})
    began = time.time()
    with pytest.raises(UserError, match=r"alpha_pattern: regular expression [^\n]*$"):
        import_peft(fresh(LLAMA), folder)
    assert time.time() - began < 5


# ---- other numbers

@pytest.mark.parametrize("dtype", [
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.bool, torch.int64])
@pytest.mark.parametrize("pickled", [False, True])
def test_tensors_of_any_numbers_are_cast_as_peft_does(dtype, pickled, saved, tmp_path):
    folder = changed(saved("lora"), tmp_path / "x", lambda found: {
        name: (3 * t).to(dtype) for name, t in found.items()})
    if pickled:
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    with torch.no_grad():
        ours = import_peft(fresh(LLAMA), folder)(some_tokens())
    assert torch.allclose(ours, logits("lora", folder), atol=2e-3, rtol=2e-4)


def test_deeply_nested_json_is_one_line(saved, tmp_path):
    for depth in (300, 800, 900, 960, 990, 100_000):
        for key in ("lora_alpha", "alpha_pattern", "target_modules", "new_key"):
            folder = changed(saved("lora"), tmp_path / f"{key}{depth}")
            path = folder / "adapter_config.json"
            path.write_text(f'{{"peft_type": "LORA", "{key}": {"[" * depth}{"]" * depth}}}')
            with pytest.raises(UserError, match="adapter_config.json"):
                import_peft(fresh(LLAMA), folder)
    model = inject(fresh(LLAMA), "lora", ["q"])
    save(model, tmp_path / "file")
    for depth in (900, 990, 100_000):
        save_file(load_file(tmp_path / "file"), tmp_path / "deep",
                  {"adapter": f'{{"method": "lora", "targets": {"[" * depth}{"]" * depth}}}'})
        with pytest.raises(UserError, match="deep: cannot load"):
            load(fresh(LLAMA), tmp_path / "deep")


# ---- folders, repositories, targets

def test_adapters_where_a_model_is_asked_for_point_to_from_peft(saved, tmp_path, capsys):
    with pytest.raises(UserError, match="PEFT's adapters, not a model: give it as --from-peft"):
        load_pretrained(saved("lora"))
    shutil.copytree(checkpoint(LLAMA)[1], tmp_path / "model")
    shutil.copy(saved("lora") / "adapter_config.json", tmp_path / "model")
    with pytest.raises(UserError, match="transformers would apply these.*--from-peft"):
        load_pretrained(tmp_path / "model")
    line = refused(capsys, "--from-peft", str(saved("lora")), "--model", str(saved("lora")), "--to",
                   str(tmp_path / "out"), main=convert.main)
    assert "not a model" in line


SMALL_FILES = ["adapter_config.json", "pytorch_lora_weights.safetensors"]


def test_adapters_of_the_hub_are_fetched_without_the_rest(saved, tmp_path, monkeypatch, capsys):
    asked, place = [], saved("lora")

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(place)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = import_peft(fresh(LLAMA), "owner/name")
    assert set(adapters(model)) == {f"layers.{i}.attn.{name}" for i in (0, 1) for name in "qv"}
    assert asked == [("owner/name", SMALL_FILES + ["adapter_model.safetensors"])]
    place = changed(saved("lora"), tmp_path / "x")
    file = place / "adapter_model.safetensors"
    torch.save(load_file(file), place / "adapter_model.bin")
    file.unlink()
    import_peft(fresh(LLAMA), "owner/name")
    assert asked[-1][1] == SMALL_FILES + ["adapter_model.bin"]

    def unreachable(*args, **kwargs):
        raise OSError("no\nnetwork")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    line = refused(capsys, "--from-peft", "owner/name", "--model", str(BASE), "--to",
                   str(tmp_path / "out"), main=convert.main)
    assert "owner/name: no such folder, and not fetched from the hub: no network" in line


ATTENTION, MLP = ["attn.q", "attn.k", "attn.v", "attn.o"], ["mlp.gate", "mlp.up", "mlp.down"]


@pytest.mark.parametrize("family, targets, found, recorded", [
    (LLAMA, "q_proj, v_proj", ["attn.q", "attn.v"], ["q", "v"]),
    (LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
     ATTENTION + MLP, ["down", "gate", "k", "o", "q", "up", "v"]),
    (LLAMA, "all-linear", ATTENTION + MLP, ["down", "gate", "k", "o", "q", "up", "v"]),
    (LLAMA, "q, self_attn.v_proj", ["attn.q", "attn.v"], ["q", "v"]),
    ("llama", "all-linear", ATTENTION + MLP, ["down", "gate", "k", "o", "q", "up", "v"]),
    (GPT2, ["c_attn"], ATTENTION[:3], ["k", "q", "v"]),
    (GPT2, ["c_proj"], ["attn.o", "mlp.down"], ["down", "o"]),
    (GPT2, ["attn.c_proj", "c_fc"], ["attn.o", "mlp.up"], ["o", "up"]),
    (GPT2, "all-linear", ATTENTION + MLP[1:], ["down", "k", "o", "q", "up", "v"])])
def test_pefts_names_are_targets(family, targets, found, recorded, tmp_path):
    model = inject(fresh(family), "lora", targets, rank=2)
    assert set(adapters(model)) == {f"layers.{i}.{name}" for i in (0, 1) for name in found}
    assert model.injected["targets"] == recorded
    save(model, tmp_path / "adapter.safetensors")
    again = load(fresh(family), tmp_path)                   # a folder, as a run's
    assert set(adapters(again)) == set(adapters(model))
    export_peft(model, tmp_path / "out")
    assert set(adapters(import_peft(fresh(family), tmp_path / "out"))) == set(adapters(model))


def test_one_layer_by_pefts_name_and_names_that_are_none():
    model = inject(fresh(LLAMA), "lora", "model.layers.1.mlp.up_proj")
    assert list(adapters(model)) == model.injected["targets"] == ["layers.1.mlp.up"]
    for name in ("c_attn", "embed_tokens", "lm_head", "x_proj", ""):
        with pytest.raises(UserError, match=f"no nn.Linear is named {name}"):
            inject(fresh(LLAMA), "lora", ["q", name])


def test_the_names_of_a_model_of_another_kind_stay_its_own():
    theirs = inject(copy.deepcopy(checkpoint(LLAMA)[0]), "lora", ["q_proj"])
    assert set(adapters(theirs)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    with pytest.raises(UserError, match="no nn.Linear is named all-linear"):
        inject(copy.deepcopy(checkpoint(LLAMA)[0]), "lora", "all-linear")
