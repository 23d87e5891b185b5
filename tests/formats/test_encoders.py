import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import edit, refusal, tensors_of, write
from conftest import SHARED, needs
from encoder_checkpoints import CONFIGS, HEADS, encoder, random_encoder, some_texts

from convert import load_pretrained, save_pretrained

FEW = ["bert", "roberta", "deberta", "deberta-v3"]
few = pytest.mark.parametrize("name", FEW)
every = pytest.mark.parametrize("name", [name if name in FEW else pytest.param(
    name, marks=pytest.mark.slow) for name in CONFIGS])
SAPIENS = SHARED / "sapiens_roberta"


def types_for(model, types):
    """Returns the types where the model has so many."""
    return types if model.config.n_types > 1 else None


def outputs(theirs, ours, head, tokens, mask, types):
    """Returns what both models compute, of real tokens alone."""
    types = types_for(ours, types)
    extra = {} if types is None else {"token_type_ids": types}
    found = theirs(tokens, attention_mask=mask, output_hidden_states=True, **extra)
    real = mask.bool()
    hidden = found.hidden_states[-1][real], ours.hidden(tokens, mask, types)[real]
    if head == "base":
        return [hidden]
    if head == "mlm":
        return [hidden, (found.logits[real], ours.mlm(tokens, mask, types)[real])]
    return [hidden, (found.logits, ours(tokens, mask, types))]


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("head", HEADS)
@every
def test_we_compute_what_transformers_does(name, head, length):
    theirs, _, ours = encoder(name, head)
    with torch.no_grad():
        for right, found in outputs(theirs, ours, head, *some_texts(ours.config.pad, length)):
            assert right.shape == found.shape
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


# transformers takes the LayerNorm of DeBERTa v1 in float32, and the root of 2 D too.
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v3", "deberta-v2 without buckets",
                                  "deberta-v2 with layers of its own"])
def test_in_float64_too_where_transformers_computes_in_it(name):
    _, folder, _ = encoder(name, "labels")
    ours = load_pretrained(folder, dtype=torch.float64)[0].eval()
    theirs = random_encoder(name, "labels").double()
    with torch.no_grad():
        for right, found in outputs(theirs, ours, "labels", *some_texts(ours.config.pad)):
            torch.testing.assert_close(found, right, atol=1e-10, rtol=1e-10)


@every
def test_the_gradients_of_every_weight_are_transformers_s(name, tmp_path):
    theirs, _, ours = encoder(name, "labels")
    theirs.zero_grad()
    ours.zero_grad()
    tokens, mask, types = some_texts(ours.config.pad)
    labels, types = torch.tensor([0, 2, 1]), types_for(ours, types)
    extra = {} if types is None else {"token_type_ids": types}
    F.cross_entropy(theirs(tokens, attention_mask=mask, **extra).logits, labels).backward()
    F.cross_entropy(ours(tokens, mask, types), labels).backward()
    # The gradients travel as weights do: written, they have transformers' names.
    for p in ours.parameters():
        p.requires_grad_(False).copy_(p.grad)
    save_pretrained(ours, tmp_path)
    found = tensors_of(tmp_path)
    for key, p in theirs.named_parameters():
        if p.grad is not None and key in found:
            torch.testing.assert_close(found[key], p.grad, atol=1e-5, rtol=1e-4, msg=key)
    named = {key for key, p in theirs.named_parameters() if p.grad is not None}
    assert named == set(found)
    encoder.cache_clear()


@pytest.mark.parametrize("head", HEADS)
@every
def test_transformers_loads_what_we_save(name, head, tmp_path):
    theirs, _, ours = encoder(name, head)
    save_pretrained(ours, tmp_path)
    back = HEADS[head].from_pretrained(tmp_path).eval()
    assert type(back) is type(theirs)
    again = load_pretrained(tmp_path)[0].eval()
    assert again.config == ours.config
    with torch.no_grad():
        for right, found in outputs(back, again, head, *some_texts(ours.config.pad)):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        for right, found in outputs(theirs, again, head, *some_texts(ours.config.pad)):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


# ---- dialects
def changed(tensors, *pairs):
    """Replaces parts of the tensors' names."""
    for old, new in pairs:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return tensors


def copy_of(name, head, place, n_labels=3):
    """Writes a fresh copy of a checkpoint to a folder; returns its config.json and our model."""
    theirs, _, ours = encoder(name, head, n_labels)
    theirs.save_pretrained(place)
    return place / "config.json", ours


def same_model(place, ours):
    """Loads the folder, and asserts that the model has the same weights."""
    again = load_pretrained(place)[0]
    a, b = ours.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return again


@few
def test_old_names_of_norms_are_read(name, tmp_path):
    _, ours = copy_of(name, "mlm", tmp_path)
    norms = [(f"{norm}.{new}", f"{norm}.{old}") for norm in ("LayerNorm", "layer_norm")
             for new, old in (("weight", "gamma"), ("bias", "beta"))]
    write(tmp_path, changed(tensors_of(tmp_path), *norms))
    same_model(tmp_path, ours)


@few
def test_names_without_the_prefix_are_read(name, tmp_path):
    _, ours = copy_of(name, "labels", tmp_path)
    prefix = name.partition("-")[0] + "."
    write(tmp_path, {key.removeprefix(prefix): t for key, t in tensors_of(tmp_path).items()})
    same_model(tmp_path, ours)


@few
def test_what_other_pretraining_tasks_left_is_dropped(name, tmp_path):
    """A head for masked tokens beside one for labels, position numbers, and other tasks' heads."""
    _, ours = copy_of(name, "labels", tmp_path)
    left = {key: t for key, t in encoder(name, "mlm")[0].state_dict().items()
            if not key.startswith(name.partition("-")[0])}
    left |= {"mask_predictions.dense.weight": torch.zeros(2, 2)} if "deberta" in name else {
        f"{name}.embeddings.position_ids": torch.arange(4)[None].float()}
    left |= {"cls.seq_relationship.weight": torch.zeros(2, 24)} if name == "bert" else {}
    left |= {"roberta.pooler.dense.weight": torch.zeros(24, 24)} if name == "roberta" else {}
    write(tmp_path, tensors_of(tmp_path) | {key: t.clone() for key, t in left.items()})
    same_model(tmp_path, ours)


def test_deberta_s_unused_positions_are_dropped(tmp_path):
    _, ours = copy_of("deberta", "base", tmp_path)
    unused = {"deberta.embeddings.position_embeddings.weight": torch.zeros(48, 24)}
    write(tmp_path, tensors_of(tmp_path) | unused)
    same_model(tmp_path, ours)


@pytest.mark.parametrize("name", ["deberta", "deberta-v3"])
def test_the_head_under_bert_s_names_is_read(name, tmp_path):
    """transformers saves DeBERTa's head for masked tokens so, unless `legacy` is false."""
    theirs = HEADS["mlm"].from_config(CONFIGS[name]()).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)[0].eval()
    tokens, mask, _ = some_texts(0)
    with torch.no_grad():
        right = theirs(tokens, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(ours.mlm(tokens, mask)[mask.bool()], right)


@pytest.mark.parametrize("name, head", [("bert", "cls.predictions"), ("roberta", "lm_head")])
def test_a_decoder_repeated_beside_the_embedding_is_read_if_it_is_the_same(name, head, tmp_path):
    _, ours = copy_of(name, "mlm", tmp_path)
    tensors = tensors_of(tmp_path)
    embed = tensors[f"{name}.embeddings.word_embeddings.weight"]
    bias = {f"{head}.decoder.bias": tensors[f"{head}.bias"].clone()}
    write(tmp_path, tensors | {f"{head}.decoder.weight": embed.clone()} | bias)
    same_model(tmp_path, ours)
    write(tmp_path, tensors | {f"{head}.decoder.bias": tensors[f"{head}.bias"] + 1})
    assert "is there twice" in refusal(load_pretrained, tmp_path)
    del tensors[f"{head}.bias"]
    write(tmp_path, tensors | bias)
    same_model(tmp_path, ours)
    write(tmp_path, tensors | bias | {f"{head}.decoder.weight": embed + 1})
    assert f"{head}.decoder.weight is not the embedding" in refusal(load_pretrained, tmp_path)


def test_a_float16_bin_without_a_dtype_is_float16(tmp_path):
    """The form of the published DeBERTa-v3."""
    config, ours = copy_of("deberta-v3", "base", tmp_path)
    torch.save({key: t.half() for key, t in tensors_of(tmp_path).items()},
               tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    edit(config, dtype=..., torch_dtype=...)
    model, _ = load_pretrained(tmp_path)
    assert all(p.dtype == torch.float16 for p in model.parameters())
    assert all(torch.equal(p, q.half()) for p, q in zip(model.parameters(), ours.parameters()))


@few
def test_the_tensor_says_how_many_labels_there_are(name, tmp_path):
    config, ours = copy_of(name, "labels", tmp_path, n_labels=3)
    edit(config, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}, num_labels=7)
    again = same_model(tmp_path, ours)
    assert again.config.n_labels == 3 and again.config.labels == []
    edit(config, id2label={"2": "maybe", "0": "no", "1": "yes"})
    again = same_model(tmp_path, ours)
    assert again.config.labels == ["no", "yes", "maybe"]
    save_pretrained(again, tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert HEADS["labels"].from_pretrained(tmp_path / "again").config.num_labels == 3


@few
def test_one_label_is_a_score(name, tmp_path):
    theirs, _, ours = encoder(name, "labels", 1)
    tokens, mask, _ = some_texts(ours.config.pad)
    with torch.no_grad():
        right = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(ours(tokens, mask), right, atol=1e-5, rtol=1e-5)
    save_pretrained(ours, tmp_path)
    assert HEADS["labels"].from_pretrained(tmp_path).config.num_labels == 1


PUBLIC = {      # the keys that public files leave out, with their families' values
    "roberta": dict(layer_norm_eps=1e-5, type_vocab_size=1, pad_token_id=1),
    "bert": dict(layer_norm_eps=1e-12, type_vocab_size=2, pad_token_id=0),
    "deberta": dict(layer_norm_eps=1e-7, type_vocab_size=0, position_biased_input=False,
                    relative_attention=True, pad_token_id=0),
    "deberta-v3": dict(layer_norm_eps=1e-7, type_vocab_size=0, position_biased_input=False,
                       relative_attention=True, norm_rel_ebd="layer_norm", share_att_key=True,
                       pos_att_type=["c2p", "p2c"]),
}


@few
def test_keys_that_are_left_out_mean_what_the_public_checkpoints_say(name, tmp_path):
    config, ours = copy_of(name, "mlm", tmp_path)
    raw = json.loads(config.read_text())
    edit(config, **{key: ... for key in PUBLIC[name]})
    for key, value in PUBLIC[name].items():
        assert raw[key] == value or key == "pos_att_type" and sorted(raw[key]) == value
    assert same_model(tmp_path, ours).config == ours.config


@pytest.mark.parametrize("spelt", ["p2c|c2p", "C2P | p2c", ["p2c", "c2p"]])
def test_the_terms_are_a_list_or_words_with_a_bar_in_any_order(spelt, tmp_path):
    config, ours = copy_of("deberta-v3", "base", tmp_path)
    edit(config, pos_att_type=spelt)
    assert same_model(tmp_path, ours).config == ours.config


@pytest.mark.parametrize("name, change, word", [
    ("deberta-v3", dict(conv_kernel_size=3), "conv_kernel_size"),
    ("deberta", dict(talking_head=True), "talking_head"),
    ("deberta-v3", dict(embedding_size=12), "embedding_size"),
    ("bert", dict(is_decoder=True), "is_decoder"),
    ("roberta", dict(add_cross_attention=True), "add_cross_attention"),
    ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type"),
    ("bert", dict(hidden_act="relu"), "hidden_act"),
    ("deberta-v3", dict(relative_attention=False), "relative_attention"),
    ("deberta-v3", dict(pooler_hidden_act="tanh"), "pooler_hidden_act"),
    ("deberta-v3", dict(attention_head_size=5), "attention_head_size"),
    ("deberta", dict(pos_att_type="c2p|p2p"), "pos_att_type"),
    ("deberta", dict(pos_att_type="c2p|c2p"), "pos_att_type"),
    ("deberta-v3", dict(pos_att_type=7), "pos_att_type"),
    ("deberta-v3", dict(norm_rel_ebd="rms"), "norm_rel_ebd"),
    ("deberta-v3", dict(position_buckets=400), "position_buckets"),
    ("deberta-v3", dict(position_buckets="8"), "position_buckets"),
    ("deberta-v3", dict(max_relative_positions=None), "max_relative_positions"),
    ("deberta-v3", dict(share_att_key=1), "share_att_key"),
    ("bert", dict(num_attention_heads=5), "5 heads"),
    ("bert", dict(hidden_dropout_prob=1.5), "hidden_dropout_prob"),
    ("bert", dict(type_vocab_size=-1), "type_vocab_size"),
    ("roberta", dict(max_position_embeddings=2), "max_position_embeddings"),
    ("bert", dict(id2label={"x": "no"}), "id2label"),
    ("bert", dict(id2label=["no"]), "id2label"),
    ("bert", dict(id2label=[1]), "id2label"),
    ("deberta-v3", dict(pooler_dropout=0.9), "pooler_dropout"),
    ("bert", dict(num_hidden_layers=3), "3 layers"),
    ("bert", dict(vocab_size=60), "word_embeddings"),
    ("bert", dict(intermediate_size=41), "intermediate"),
])
def test_what_we_would_compute_otherwise_is_refused_by_name(name, change, word, tmp_path):
    config, _ = copy_of(name, "labels", tmp_path)
    edit(config, **change)
    assert word in refusal(load_pretrained, tmp_path)


def test_a_head_of_another_kind_is_refused_by_its_tensors(tmp_path):
    """A model for the words of a text has no pooler; one for spans of it has an odd head."""
    theirs = transformers.BertForTokenClassification(CONFIGS["bert"]())
    theirs.save_pretrained(tmp_path / "words")
    assert "bert.pooler.dense" in refusal(load_pretrained, tmp_path / "words")
    theirs = transformers.BertForQuestionAnswering(CONFIGS["bert"]())
    theirs.save_pretrained(tmp_path / "spans")
    assert "qa_outputs" in refusal(load_pretrained, tmp_path / "spans")


@few
def test_checkpoint_names_of_layers_are_targets_too(name):
    _, _, ours = encoder(name, "labels")
    known = ours.also_named
    prefix = name.partition("-")[0]
    q = {"deberta": "in_proj", "deberta-v3": "query_proj"}.get(name, "query")
    assert "layers.0.attn.q" in known[f"{prefix}.encoder.layer.0.attention.self.{q}"]
    assert known[f"{prefix}.encoder.layer.1.output.dense"] == ["layers.1.mlp.down"]
    assert not any("head" in path for path in known["all-linear"])


@needs(SAPIENS)
def test_a_real_roberta_gives_its_authors_probabilities():
    model, tokenizer = load_pretrained(SAPIENS)
    oracle, vocab = (json.loads((SAPIENS / name).read_text())
                     for name in ("oracle.json", "vocab.json"))
    ids, _ = tokenizer.pair(oracle["input"].replace("*", "<mask>"), None, 144)
    assert ids == oracle["ids"]
    model.eval()
    with torch.no_grad():
        scores = model.mlm(torch.tensor([ids]), None)[0, 1:-1]
    found = scores.softmax(-1)[:5, [vocab[letter] for letter in "ACDE"]]
    right = torch.tensor(oracle["readme_scores_ACDE"])
    assert found.numel() == 20
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)
    letters = [letter for letter in vocab if len(letter) == 1]
    best = scores[:, [vocab[letter] for letter in letters]].argmax(-1).tolist()
    filled = "".join(letters[i] if gap == "*" else gap for gap, i in zip(oracle["input"], best))
    assert filled == oracle["infilled_readme"]
