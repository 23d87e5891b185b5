"""Adapters to and from PEFT: the same logits on both sides, or refused by name."""
import copy
import json
import shutil
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from conftest import BASE
from reference import checkpoint, some_tokens
from runs import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import convert
import train
from dora import MagnitudeLinear
from formats.checkpoint import load_pretrained
from formats.peft import MAPPED, export_peft, import_peft
from lora import LoRALinear
from methods import METHODS, Method, adapters, inject, load, merge, save, state
from support.errors import UserError

ADAPTERS = sorted(MAPPED) + ["lora with pissa", "dash with pissa",
                             *(f"{method} with dora" for method in ("lora+", "adalora", "dash"))]
FAMILIES = ["gpt2", "llama with a tied head"]
PAIRS = [(family, method) for family in FAMILIES for method in ADAPTERS
         if (family, method) != ("gpt2", "loha")]       # PEFT has none for GPT-2's Conv1D


def fresh(family: str):
    return load_pretrained(checkpoint(family)[1])[0].eval()


def trained(family: str, method: str, targets=("q", "v", "up"), **hyper):
    """A model whose adapters hold what training might have left there."""
    method, _, option = method.partition(" with ")
    hyper |= {"dora": dict(dora=True), "pissa": dict(ab_init="pissa")}.get(option, {})
    model = inject(fresh(family), method, targets, **dict(rank=4, alpha=6) | hyper)
    with torch.no_grad():
        for name, tensor in state(model).items():
            if not name.endswith(("magnitude", "warmup", "dashing")):
                tensor.normal_(std=0.3)
    for layer in adapters(model).values():
        if isinstance(layer, MagnitudeLinear):
            layer.magnitude.data.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
        if method == "dual":
            layer.warmup.fill_(0.75)
        if method == "adalora":
            layer.lam.data[[0, 2]] = 0                      # pruned
    if method == "adalora":
        next(iter(adapters(model).values())).lam.data.zero_()       # a layer that kept nothing
    if method == "dash":
        type(layer).on_step(adapters(model).values(), 99, 200)
        for layer in adapters(model).values():
            layer.coords.data.normal_()
    return model.eval()


def in_peft(family: str, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(checkpoint(family)[0]), folder).eval()


def logits_of(theirs):
    return theirs(some_tokens()).logits


def assert_same(a, b):
    assert torch.allclose(a, b, atol=2e-4, rtol=2e-4), (a - b).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family, method", PAIRS)
def test_peft_computes_the_logits_of_what_we_write(family, method, tmp_path):
    model = trained(family, method)
    largest = 32                                            # the narrowest matrix: nothing is lost
    lost = export_peft(model, tmp_path, *([largest] if method == "dual" else []))
    assert_same(logits_of(in_peft(family, tmp_path)), model(some_tokens()))
    assert len(lost) == (len(adapters(model)) if method == "dual" else 0)
    assert all(value < 1e-5 for value in lost.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if method in ("lora", "lora+", "dora") and family != "gpt2":
        assert (config["r"], config["lora_alpha"]) == (4, 6)
        assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    if family != "gpt2":
        ranks = {"dash": 4 + 8, "dash with dora": 4 + 8, "lora with pissa": 2 * 4,
                 "dash with pissa": 2 * 4 + 8, "loha": 2, "hira": 4}
        assert method not in ranks or config["r"] == ranks[method]
    assert config["peft_type"] == {"loha": "LOHA", "hira": "HIRA"}.get(method, "LORA")
    assert config.get("use_dora", False) == (method == "dora" or method.endswith("with dora"))


@torch.no_grad()
def test_a_loha_of_odd_rank_is_filled_with_zeros(tmp_path):
    model = trained(FAMILIES[1], "loha", rank=5)
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    assert_same(logits_of(in_peft(FAMILIES[1], tmp_path)), model(some_tokens()))


@pytest.mark.parametrize("method, family, words", [
    ("dual with dora", FAMILIES[1], "DoRA over LoRA alone, not over dual"),
    ("hira with dora", FAMILIES[1], "DoRA over LoRA alone, not over hira"),
    ("loha", "gpt2", "no LoHa for GPT-2")])
def test_what_peft_does_not_have_is_refused_by_name(method, family, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_peft(trained(family, method), tmp_path / "out", 4 if "dual" in method else None)
    assert not (tmp_path / "out").exists()


HADAMARD = {"LoHa": (peft.LoHaConfig, dict(r=3, alpha=5, target_modules=["q_proj", "up_proj"],
                                           rank_pattern={"up_proj": 2},
                                           alpha_pattern={"q_proj": 7})),
            "HiRA": (peft.HiraConfig, dict(r=3, target_modules=["q_proj", "up_proj"],
                                           hira_dropout=0.1)),
            "HiRA, fused": (peft.HiraConfig, dict(r=3, target_modules=["c_attn"],
                                                  fan_in_fan_out=True))}


@torch.no_grad()
@pytest.mark.parametrize("name", HADAMARD)
def test_we_compute_the_logits_of_peft_s_loha_and_hira(name, tmp_path):
    kind, options = HADAMARD[name]
    family = "gpt2" if "fused" in name else FAMILIES[1]
    theirs = peft.get_peft_model(copy.deepcopy(checkpoint(family)[0]),
                                 kind(**options, task_type="CAUSAL_LM")).eval()
    for key, p in theirs.named_parameters():
        if "hada_" in key or "hira_" in key:
            p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(fresh(family), tmp_path)
    assert_same(ours(some_tokens()), logits_of(theirs))
    assert ours.injected["method"] == ("loha" if name == "LoHa" else "hira")
    assert ours.injected["dropout"] == options.get("hira_dropout", 0)


@torch.no_grad()
@pytest.mark.parametrize("family, method", PAIRS)
def test_what_we_write_can_be_read_again(family, method, tmp_path):
    model = trained(family, method)
    export_peft(model, tmp_path, *([32] if method == "dual" else []))
    assert_same(import_peft(fresh(family), tmp_path)(some_tokens()), model(some_tokens()))


@torch.no_grad()
def test_a_dual_lora_loses_what_its_smaller_singular_values_hold(tmp_path):
    model = trained("llama with a tied head", "dual")
    for path, value in export_peft(model, tmp_path, 3).items():
        S = torch.linalg.svdvals(model.get_submodule(path).delta_weight())
        assert value == pytest.approx((S[3:].norm() / S.norm()).item(), rel=1e-3)


THEIRS = {
    "plain": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "rsLoRA": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "DoRA": dict(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "o_proj"]),
    "patterns": dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"],
                     rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5},
                     alpha_pattern={"layers.0.self_attn.q_proj": 9, "up_proj": 3}),
    "a pattern with a dot": dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"],
                                 alpha_pattern={"q.proj": 12, "up": 9}),
    "some layers": dict(r=2, lora_alpha=4, target_modules=["q_proj"], layers_to_transform=[1]),
    "a path": dict(r=2, lora_alpha=4, target_modules=["model.layers.0.mlp.up_proj"]),
    "fused": dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "fused DoRA": dict(r=4, lora_alpha=6, target_modules=["c_attn"], use_dora=True,
                       fan_in_fan_out=True),
    "both projections": dict(r=2, lora_alpha=4, target_modules=["c_proj"], fan_in_fan_out=True),
}


def their_adapters(name: str, folder, kind=peft.LoraConfig, **more):
    family = "gpt2" if any("c_" in t for t in THEIRS[name]["target_modules"]) else FAMILIES[1]
    theirs = peft.get_peft_model(copy.deepcopy(checkpoint(family)[0]),
                                 kind(**THEIRS[name] | more, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + 0.1 * torch.rand_like(p))
            elif "lora_" in key:
                p.normal_(std=0.3)
    theirs.save_pretrained(folder)
    return family, theirs


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_logits_of_what_peft_writes(name, tmp_path):
    family, theirs = their_adapters(name, tmp_path)
    ours = import_peft(fresh(family), tmp_path)
    with torch.no_grad():
        assert_same(ours(some_tokens()), logits_of(theirs))
        save(ours, tmp_path / "ours.safetensors")
        again = load(fresh(family), tmp_path / "ours.safetensors")
        assert torch.equal(again(some_tokens()), ours(some_tokens()))
        assert_same(merge(again)(some_tokens()), logits_of(theirs))
        export_peft(ours, tmp_path / "back")
        assert_same(logits_of(in_peft(family, tmp_path / "back")), logits_of(theirs))


def test_an_adalora_that_peft_has_trained_and_pruned_is_read_as_a_lora(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, tinit=1, tfinal=2, deltaT=1,
                                total_step=8, target_modules=["q_proj", "v_proj"],
                                task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(checkpoint(FAMILIES[1])[0]), config)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    for step in range(8):
        theirs(some_tokens(), labels=some_tokens()).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    sizes = {len(t) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()
             if "lora_E" in key}
    assert len(sizes) > 1                                   # it did prune
    with torch.no_grad():
        assert_same(import_peft(fresh(FAMILIES[1]), tmp_path)(some_tokens()), logits_of(theirs))


def test_the_parts_of_a_fused_layer_train_on(tmp_path):
    family, _ = their_adapters("fused", tmp_path)
    ours = import_peft(fresh(family), tmp_path)
    attn = ours.layers[0].attn
    assert torch.equal(attn.q.A, attn.k.A) and not torch.equal(attn.q.B, attn.k.B)
    ours(some_tokens()).square().mean().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    assert not torch.equal(attn.q.A.grad, attn.k.A.grad)


@pytest.mark.parametrize("change, said", [
    (dict(peft_type="IA3"), "IA3"),
    (dict(bias="all"), "bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(layer_replication=[[0, 1]]), "layer_replication"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    (dict(use_qalora=True), "use_qalora"),
    (dict(something_new=3), "something_new"),
    (dict(init_lora_weights="pissa"), "pissa"),
    (dict(lora_alpha="16"), "lora_alpha"),
    (dict(lora_alpha=float("nan")), "lora_alpha"),
    (dict(lora_dropout=-1), "lora_dropout"),
    (dict(alpha_pattern=[1]), "alpha_pattern"),
    (dict(use_dora=True), "use_dora does not fit"),
])
def test_what_cannot_be_mapped_is_refused_by_name(change, said, tmp_path):
    family, _ = their_adapters("plain", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = fresh(family)
    with pytest.raises(UserError, match=said):
        import_peft(model, tmp_path)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("change, said", [
    (lambda t: {k.replace("q_proj", "x_proj"): v for k, v in t.items()}, "x_proj"),
    (lambda t: {k.replace("lora_A", "lora_embedding_A"): v for k, v in t.items()}, "embedding_A"),
    (lambda t: {k: v[:, :3].contiguous() for k, v in t.items()}, "do not fit"),
    (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lora_B"),
    (lambda t: {k: v.to(torch.complex64) for k, v in t.items()}, "of plain numbers"),
    (lambda t: {k: v[:0].clone() if "_A" in k else v[:, :0].clone() for k, v in t.items()},
     "do not fit"),
    (lambda t: {k: v[0].contiguous() for k, v in t.items()}, "matrices"),
    (lambda t: {}, "no adapters"),
])
def test_tensors_that_do_not_fit_are_refused(change, said, tmp_path):
    family, _ = their_adapters("plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)
    with pytest.raises(UserError, match=said):
        import_peft(fresh(family), tmp_path)


def test_a_value_that_overflows_is_refused_and_the_model_is_as_it_was(tmp_path):
    family, _ = their_adapters("plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t.double() * 1e39 for name, t in load_file(file).items()}, file)
    model = fresh(family)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down\.A"):
        import_peft(model, tmp_path)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    inject(model, "lora", ["q"])                            # so it has not been injected


def test_what_peft_has_no_form_for_is_refused(tmp_path):
    with pytest.raises(UserError, match="full trains the weights themselves"):
        export_peft(inject(fresh("gpt2"), "full"), tmp_path / "x")
    with pytest.raises(UserError, match="no low rank"):
        export_peft(trained("gpt2", "dual"), tmp_path / "x")
    with pytest.raises(UserError, match="rank 99"):
        export_peft(trained("gpt2", "dual"), tmp_path / "x", 99)
    with pytest.raises(UserError, match="written as it is"):
        export_peft(trained("gpt2", "lora"), tmp_path / "x", 4)
    assert not (tmp_path / "x").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    family, _ = their_adapters("plain", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin"):
        import_peft(fresh(family), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_adapters_as_a_pickle_of_tensors_are_read(tmp_path):
    family, theirs = their_adapters("plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    with torch.no_grad():
        assert_same(import_peft(fresh(family), tmp_path)(some_tokens()), logits_of(theirs))


# ---- python convert.py

COMMANDED = [method if method in ("full", "lora", "dual") else
             pytest.param(method, marks=pytest.mark.slow) for method in ["full", *ADAPTERS]]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(method) -> a run of a few steps, on the base that ships."""
    top = tmp_path_factory.mktemp("runs")

    @cache
    @torch.enable_grad()            # tests without gradients call this
    def run(method: str) -> Path:
        name, _, option = method.partition(" with ")
        more = {"dora": ["--dora"], "pissa": ["--ab-init", "pissa"]}.get(option, [])
        train.main(["--method", name, *more, "--steps", "4", "--batch-size", "4", "--max-eval",
                    "3", "--skip-before", "--out", str(top / method)])
        return top / method
    return run


def command(*flags) -> None:
    convert.main([str(flag) for flag in flags])


@torch.no_grad()
@pytest.mark.parametrize("method", COMMANDED)
def test_a_merged_run_is_read_by_transformers(method, run_of, tmp_path, capsys):
    command("--run", run_of(method), "--to", tmp_path / "out")
    ours = load(load_pretrained(BASE)[0], run_of(method) / "adapter.safetensors").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same(theirs(some_tokens()).logits, ours(some_tokens()))
    merged, tokenizer = load_pretrained(tmp_path / "out")
    assert_same(merged(some_tokens()), ours(some_tokens()))
    assert tokenizer.encode("Leo Pelridge works") == load_pretrained(BASE)[1].encode(
        "Leo Pelridge works")
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("method", COMMANDED[1:])            # all but full
def test_a_runs_adapters_are_read_by_peft(method, run_of, tmp_path, capsys):
    run = run_of(method)
    capsys.readouterr()
    command("--run", run, "--peft", tmp_path / "out",
            *(["--rank", 128] if method == "dual" else []))
    ours = load(load_pretrained(BASE)[0], run_of(method) / "adapter.safetensors").eval()
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "out").eval()
    assert_same(theirs(some_tokens()).logits, ours(some_tokens()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 + len(adapters(ours)) if method == "dual" else 1)
    command("--from-peft", tmp_path / "out", "--model", BASE, "--to", tmp_path / "merged")
    assert_same(load_pretrained(tmp_path / "merged")[0](some_tokens()), ours(some_tokens()))


def test_generation_settings_and_tokenizer_files_come_along(tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.7}')
    (tmp_path / "model" / "notes.txt").write_text("not copied")
    export_peft(inject(load_pretrained(BASE)[0], "lora", ["q"]), tmp_path / "peft")
    command("--from-peft", tmp_path / "peft", "--model", tmp_path / "model", "--to",
            tmp_path / "out")
    names = {path.name for path in (tmp_path / "model").iterdir()} - {"notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"config.json", "generation_config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_link_is_followed_within_the_hubs_cache_and_not_out_of_a_folder(tmp_path, capsys):
    """The cache keeps a file under its hash in blobs/, and links to it."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1f", tmp_path / "models--a--b/blobs"
    shutil.copytree(BASE, snapshot)
    blobs.mkdir()
    (blobs / "9c").write_text('{"temperature": 0.7}')
    (snapshot / "generation_config.json").symlink_to("../../blobs/9c")
    export_peft(inject(load_pretrained(BASE)[0], "lora", ["q"]), tmp_path / "peft")
    flags = ["--from-peft", tmp_path / "peft", "--model", snapshot, "--to"]
    command(*flags, tmp_path / "out")
    assert "0.7" in (tmp_path / "out" / "generation_config.json").read_text()
    (tmp_path / "secret").write_text('{"eos_token_id": 1}')
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SystemExit):
        command(*flags, tmp_path / "out2")
    assert "a link that leads out" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("flags, said", [
    ([], "--run"),
    (["--run", "RUN"], "--to"),
    (["--run", "RUN", "--to", ""], "exists already"),
    (["--run", "", "--to", "a"], "not a run folder"),
    (["--run", "RUN", "--to", "a", "--peft", "b"], "--to"),
    (["--run", "RUN", "--from-peft", "x", "--to", "a"], "--run"),
    (["--run", "RUN", "--model", "x", "--to", "a"], "--model"),
    (["--from-peft", "x", "--to", "a"], "--model"),
    (["--run", "RUN", "--to", "a", "--rank", "3"], "--rank"),
    (["--run", "RUN", "--peft", "a", "--rank", "3"], "rank"),
    (["--run", "RUN", "--peft", "a", "--rnk", "3"], "did you mean --rank"),
    (["--run", "nowhere", "--to", "a"], "nowhere"),
    (["--run", "RUN", "--to", "full"], "full"),
    (["--from-peft", "nowhere", "--model", "BASE", "--to", "a"], "nowhere"),
])
def test_wrong_commands_end_with_one_line_and_write_nothing(flags, said, run_of, tmp_path,
                                                            monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine").write_text("precious")
    flags = [str({"RUN": run_of("lora"), "BASE": BASE}.get(flag, flag)) for flag in flags]
    assert said in refused(capsys, *flags, main=convert.main)
    assert [p.name for p in Path().rglob("*")] == ["full", "mine"]


def test_a_method_that_is_not_mapped_and_whole_modules_are_not_written(tmp_path, monkeypatch):
    class Own(LoRALinear):
        pass
    monkeypatch.setitem(METHODS, "own", Method(Own, 1e-2))
    for method, whole, said in (("own", (), "own is not mapped to an adapter of PEFT"),
                                ("lora", ["norm"], "the whole modules of norm.weight have no place")):
        model = inject(load_pretrained(BASE)[0], method, ["q"], whole=whole)
        with pytest.raises(UserError, match=said):
            export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
