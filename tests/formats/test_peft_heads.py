import json

import peft
import pytest
import torch
from checkpoints import edit, refusal, tensors_of
from encoder_checkpoints import HEADS, encoder, random_encoder, some_texts
from reference import CONFIGS
from safetensors.torch import load_file, save_file

from convert import export_peft, import_peft, load_pretrained, save_pretrained
from lora_dash import LoRADashLinear
from methods import adapters, inject, merge

FEW = ["bert", "roberta", "deberta", "deberta-v3"]
few = pytest.mark.parametrize("name", FEW)
TARGETS = {"deberta": ["in_proj", "output.dense"], "deberta-v3": ["query_proj", "key_proj"]}
TENSORS = "adapter_model.safetensors"


def theirs_of(name, targets=None, modules=("pooler", "classifier"), **more):
    """Makes a PEFT model with random adapters and head."""
    modules = ["classifier"] if name.startswith("roberta") and modules else modules
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, init_lora_weights=False,
                             target_modules=targets or TARGETS.get(name, ["query", "value"]),
                             modules_to_save=modules and list(modules), **more)
    model = peft.get_peft_model(random_encoder(name, "labels"), config).eval()
    torch.manual_seed(5)
    for key, p in model.named_parameters():
        if "modules_to_save" in key or "magnitude" in key:
            p.data.add_(0.3 * torch.rand_like(p))
    return model


def same_logits(theirs, ours, atol=1e-5):
    tokens, mask, _ = some_texts(ours.config.pad)
    with torch.no_grad():
        right = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(ours(tokens, mask), right, atol=atol, rtol=1e-5)
    return right


@pytest.mark.parametrize("use_dora", [False, True])
@few
def test_we_compute_what_peft_writes_head_included(name, use_dora, tmp_path):
    theirs = theirs_of(name, use_dora=use_dora)
    theirs.save_pretrained(tmp_path)
    for head in ("labels", "base"):                     # over another head, and without one
        if head == "labels":
            ours = load_pretrained(encoder(name, head)[1])[0].eval()
        else:                                           # the adapter brings all of the head
            save_pretrained(strip_head(name), tmp_path / "base")
            ours = load_pretrained(tmp_path / "base")[0].eval()
            assert ours.config.n_labels is None
        import_peft(ours, tmp_path)
        same_logits(theirs, ours)
        whole = {path for path, p in ours.named_parameters() if p.requires_grad and "head" in path}
        assert len(whole) == 4
        same_logits(theirs, merge(ours), 1e-4)


def strip_head(name):
    """Returns the encoder of a checkpoint with its head for labels taken off."""
    model = load_pretrained(encoder(name, "labels")[1])[0]
    model.head, model.config.n_labels, model.config.has_pooler = None, None, False
    return model


@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in ("dora", "adalora", "dash"))])
@pytest.mark.parametrize("targets", ["q,v", "q,k,v,o,up,down"])
@few
def test_peft_computes_what_we_write_head_included(name, targets, method, tmp_path):
    ours = load_pretrained(encoder(name, "labels")[1])[0].eval()
    inject(ours, method, targets, rank=3, alpha=5, whole=["head"])
    torch.manual_seed(6)
    if method == "dash":                                # its directions are known now
        LoRADashLinear.on_step(list(adapters(ours).values()), 99, 200)
    for layer in adapters(ours).values():
        for p in layer.parameters():
            if p.requires_grad:
                p.data.add_(0.2 * torch.randn_like(p))
    for p in ours.head.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    export_peft(ours, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["task_type"] == "SEQ_CLS"
    assert raw["modules_to_save"] == (["classifier"] if name == "roberta"
                                      else ["classifier", "pooler"])
    theirs = peft.PeftModel.from_pretrained(random_encoder(name, "labels"), tmp_path).eval()
    same_logits(theirs, ours)
    again = import_peft(load_pretrained(encoder(name, "labels")[1])[0].eval(), tmp_path)
    same_logits(theirs, again)


@few
def test_a_head_that_does_not_train_stays_out_of_the_file(name, tmp_path):
    ours = inject(load_pretrained(encoder(name, "labels")[1])[0].eval(), "lora", "q", rank=2)
    export_peft(ours, tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / TENSORS))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["task_type"] is None and raw["modules_to_save"] is None
    theirs = peft.PeftModel.from_pretrained(random_encoder(name, "labels"), tmp_path).eval()
    same_logits(theirs, ours)


@pytest.mark.parametrize("name", ["bert", "deberta-v3"])
def test_without_the_pooler_in_the_file_the_model_s_own_is_used(name, tmp_path):
    theirs = theirs_of(name, modules=None)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(load_pretrained(encoder(name, "labels")[1])[0].eval(), tmp_path)
    same_logits(theirs, ours)
    trains = {path for path, p in ours.named_parameters() if p.requires_grad and "head" in path}
    assert trains == {"head.out.weight", "head.out.bias"}
    model = strip_head(name)
    assert "pooler" in refusal(import_peft, model, tmp_path)
    assert model.head is None and model.config.n_labels is None and not adapters(model)


def test_a_part_of_a_head_is_refused(tmp_path):
    theirs_of("roberta").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = "base_model.model.classifier.out_proj"
    ours, folder = load_pretrained(encoder("roberta", "labels")[1])[0], tmp_path

    def without(*keys, **more):
        kept = {key: t for key, t in tensors.items() if key not in keys} | more
        save_file(kept, folder / TENSORS, metadata={"format": "pt"})
        return refusal(import_peft, ours, folder)

    assert "head.out.bias" in without(f"{name}.bias")
    ours = strip_head("roberta")                        # over another head, that one's stays
    assert "lacks its last layer" in without(f"{name}.bias", f"{name}.weight")
    ours = load_pretrained(encoder("roberta", "labels")[1])[0]
    assert "modules_to_save" in without(*(key for key in tensors if "classifier" in key))
    assert "is (3, 5)" in without(**{f"{name}.weight": torch.zeros(3, 5)})
    assert "NaN" in without(**{f"{name}.bias": torch.full((3,), torch.nan)})
    assert not adapters(ours) and ours.config.n_labels == 3


def test_an_adapter_with_other_labels_brings_its_own_head(tmp_path):
    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(encoder("bert", "labels", 1)[1])[0].eval()
    import_peft(ours, tmp_path)
    assert ours.config.n_labels == 3
    same_logits(theirs, ours)
    save_pretrained(merge(ours), tmp_path / "merged")
    back = HEADS["labels"].from_pretrained(tmp_path / "merged").eval()
    same_logits(back, ours, 1e-4)
    assert set(tensors_of(tmp_path / "merged")) == set(back.state_dict()) - {
        "bert.embeddings.position_ids"}


def test_targets_do_not_reach_into_a_head(tmp_path):
    """`dense` names every output layer of BERT, and the pooler too."""
    ours = load_pretrained(encoder("bert", "labels")[1])[0]
    inject(ours, "lora", "o,up,down", rank=2, whole=["head"])
    export_peft(ours, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(raw["target_modules"]) == 6 and all(
        path.startswith("bert.encoder.layer.") for path in raw["target_modules"])


def test_an_adapter_of_the_pooler_is_refused(tmp_path):
    theirs_of("deberta-v3", ["query_proj", "dense"], modules=None).save_pretrained(tmp_path)
    assert "only the linear layers of attention and MLP" in refusal(
        import_peft, load_pretrained(encoder("deberta-v3", "labels")[1])[0], tmp_path)


# ---- decoders: score.weight, on the last real token
DECODERS = ["llama", "gpt2", "qwen2", "qwen3", "mistral"]


def classifier(family, place, n_labels=3):
    """Writes transformers' classifier with random weights; returns it."""
    config = CONFIGS[family]()
    config.num_labels, config.pad_token_id = n_labels, 0
    theirs = HEADS["labels"].from_config(config).eval()
    torch.manual_seed(2)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    theirs.save_pretrained(place)
    return theirs


def same_labels(theirs, ours, atol=1e-5):
    tokens = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:], tokens[1, 5:] = 0, 0
    with torch.no_grad():
        right = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(ours.classify(tokens, mask), right, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("family", [family if family in ("llama", "gpt2") else pytest.param(
    family, marks=pytest.mark.slow) for family in DECODERS])
def test_a_decoder_s_classifier_goes_through_files_and_adapters(family, tmp_path):
    theirs = classifier(family, tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")[0].eval()
    same_labels(theirs, ours)
    save_pretrained(ours, tmp_path / "ours")
    back = HEADS["labels"].from_pretrained(tmp_path / "ours", pad_token_id=0).eval()
    assert type(back) is type(theirs)
    same_labels(back, ours)
    # PEFT's adapters in, onto a decoder that has no such head; then out, and merged
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    adapted = peft.get_peft_model(back, peft.LoraConfig(
        task_type="SEQ_CLS", r=3, target_modules=targets, init_lora_weights=False)).eval()
    for key, p in adapted.named_parameters():
        if "modules_to_save" in key:
            p.data.add_(0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = load_pretrained(tmp_path / "theirs")[0].eval()
    plain.score = None
    import_peft(plain, tmp_path / "adapter")
    same_labels(adapted, plain)
    assert plain.injected["whole"] == ["score"]
    export_peft(plain, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(HEADS["labels"].from_pretrained(
        tmp_path / "ours", pad_token_id=0), tmp_path / "again").eval()
    same_labels(again, plain)
    save_pretrained(merge(plain), tmp_path / "merged")
    same_labels(HEADS["labels"].from_pretrained(tmp_path / "merged", pad_token_id=0).eval(), plain,
                1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_comes_onto_a_checkpoint_of_half_precision_that_has_one(dtype, tmp_path):
    theirs_of("deberta-v3").save_pretrained(tmp_path)
    ours = load_pretrained(encoder("deberta-v3", "labels")[1], dtype=dtype)[0]
    import_peft(ours, tmp_path)
    assert {p.dtype for p in ours.head.parameters()} == {torch.float32}


def test_a_failed_import_leaves_the_head_as_it_was(tmp_path):
    theirs_of("deberta-v3").save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", lora_dropout=1.0)
    ours = load_pretrained(encoder("deberta-v3", "labels")[1], dtype=torch.bfloat16)[0]
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    refusal(import_peft, ours, tmp_path)
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype
               for n in after)


def test_the_pooler_alone_may_come_from_the_file(tmp_path):
    theirs = theirs_of("bert", modules=("pooler",))
    theirs.save_pretrained(tmp_path)
    tensors = {key: t for key, t in load_file(tmp_path / TENSORS).items()
               if "classifier" not in key}
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    edit(tmp_path / "adapter_config.json", modules_to_save=["pooler"], task_type=None)
    ours = import_peft(load_pretrained(encoder("bert", "labels")[1])[0].eval(), tmp_path)
    assert torch.equal(ours.head.dense.weight, tensors["base_model.model.bert.pooler.dense.weight"])


def test_two_tensors_for_one_weight_of_a_head_are_refused(tmp_path):
    theirs_of("roberta").save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / TENSORS), "base_model.model.classifier"
    tensors[f"{name}.out_proj.modules_to_save.bias"] = torch.ones(3)
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    assert "one tensor's names" in refusal(
        import_peft, load_pretrained(encoder("roberta", "labels")[1])[0], tmp_path)


@few
def test_adapters_of_an_encoder_without_a_head_load_in_peft(name, tmp_path):
    ours = inject(load_pretrained(encoder(name, "base")[1])[0].eval(), "lora", "q", rank=2)
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(random_encoder(name, "base"), tmp_path).eval()
    tokens, mask, _ = some_texts(ours.config.pad)
    with torch.no_grad():
        right = theirs(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(ours.hidden(tokens, mask)[mask.bool()], right, atol=1e-5,
                                   rtol=1e-5)
