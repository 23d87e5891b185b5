"""Trains heads on small encoders of every family through the commands that a user types."""
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import BASE
from runs import assert_eval_repeats, refused, result_of
from small_tokenizers import DEBERTA_MARKS, ROBERTA_MARKS, save_marked, save_spm, save_wordpieces

import convert
import eval as evaluation
import train
from data.glue import SETS, read_examples
from encoder import Encoder, EncoderConfig
from formats.checkpoint import load_pretrained, save_pretrained
from formats.peft import export_peft
from formats.tokenizer import load_tokenizer
from methods import inject
from support.run import load_adapters

TINY = dict(d_model=24, n_layers=2, n_heads=2, d_ff=32, max_positions=40)
V3 = dict(model_type="deberta-v2", pad=0, has_positions=False, buckets=8, reach=40,
          distance_terms=("c2p", "p2c"), norm_distances=True)
FAMILIES = {
    "bert": (save_wordpieces, dict(model_type="bert", pad=0, n_types=2, has_pooler=True)),
    "roberta": (functools.partial(save_marked, "roberta", ROBERTA_MARKS),
                dict(model_type="roberta", pad=1, n_types=1, has_mlm=True)),
    "deberta": (functools.partial(save_marked, "deberta", DEBERTA_MARKS), V3 | dict(
        model_type="deberta", buckets=0, own_distance_layers=True, norm_distances=False)),
    "deberta-v3": (save_spm, V3)}
families = pytest.mark.parametrize("family", [
    family if family == "deberta-v3" else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES])
WORDS = "the mayor house is not far they will say old town".split()
SHORT = ["--steps", "6", "--batch-size", "8", "--eval-every", "3", "--max-length", "32", "--lr",
         "1e-2", "--out", "run"]
KEPT = []


@functools.cache
def base_of(family: str) -> Path:
    """Writes a random encoder with its tokenizer."""
    KEPT.append(tempfile.TemporaryDirectory())
    folder, (save_tokenizer, own) = Path(KEPT[-1].name), FAMILIES[family]
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    vocab = load_tokenizer(folder).vocab_size
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(vocab_size=vocab, **TINY, **own)).init_weights()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(10)
    save_pretrained(model, folder)
    return folder


def write_rte(folder: Path, name="glue") -> list[str]:
    """Writes pairs in RTE's form, of which those with equal sentences are entailed."""
    rng, place = random.Random(0), folder / name
    place.mkdir()
    for file, n in (("train.tsv", 60), ("dev.tsv", 20)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(n):
            first, other = (" ".join(rng.choices(WORDS, k=4)) for _ in range(2))
            rows.append(f"{i}\t{first}\t{other if i % 2 else first}\t"
                        f"{'not_entailment' if i % 2 else 'entailment'}")
        (place / file).write_text("\n".join(rows) + "\n")
    return ["--task", "glue/rte", "--data-dir", str(place)]


@families
def test_a_run_with_a_head_is_repeated_by_eval_and_by_transformers_and_peft(family, empty_folder,
                                                                            capsys):
    flags, base = write_rte(Path()), base_of(family)
    train.main(["--method", "lora", "--model", str(base), *flags, *SHORT])
    assert_eval_repeats(capsys)
    result = result_of("run")
    model, tokenizer = load_pretrained(base)
    load_adapters("run", model)
    head = sum(p.numel() for p in model.head.parameters())
    assert result["whole"] == head == 24 * 24 + 24 + 24 * 2 + 2
    assert result["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)

    spec = SETS["glue/rte"]
    examples = read_examples(Path("glue/dev.tsv"), spec.layouts[0], spec)
    model.eval()

    def same(theirs):
        right = 0
        for e in examples:
            ids, types = (torch.tensor([row]) for row in tokenizer.pair(e.first, e.second, 32))
            types = {"token_type_ids": types} if family == "bert" else {}
            with torch.no_grad():
                found = theirs(ids, **types).logits
                ours = model(ids, None, types.get("token_type_ids"))
            torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)
            right += found.argmax().item() == e.label
        assert right / len(examples) == result["after"]["accuracy"]

    convert.main(["--run", "run", "--to", "merged"])
    same(transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval())
    convert.main(["--run", "run", "--peft", "adapter"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    same(peft.PeftModel.from_pretrained(theirs, "adapter").eval())

    capsys.readouterr()
    evaluation.main(["--model", "merged", *flags])     # the head is in the folder now
    assert f"{result['after']['accuracy']:.4f}" in capsys.readouterr().out
    convert.main(["--from-peft", "adapter", "--model", str(base), "--to", "again"])
    same(transformers.AutoModelForSequenceClassification.from_pretrained("again").eval())


@families
def test_a_resumed_run_is_the_uninterrupted_one(family, empty_folder):
    flags = [*write_rte(Path()), "--model", str(base_of(family)), "--dropout", "0.1"]
    train.main(["--method", "dora", *flags, *SHORT])
    shutil.move("run", "whole")
    kept, real = {}, train.Run.checkpoint

    def checkpoint(run, model, optimizer, step):
        real(run, model, optimizer, step)
        kept[step] = (run.folder / "checkpoint.pt").read_bytes()
    train.Run.checkpoint = checkpoint
    try:
        train.main(["--method", "dora", *flags, *SHORT, "--save-every", "2"])
    finally:
        train.Run.checkpoint = real
    Path("run/checkpoint.pt").write_bytes(kept[4])
    for name in ("result.json", "adapter.safetensors"):
        Path("run", name).unlink()
    train.main(["--resume", "--out", "run"])
    assert (Path("run/adapter.safetensors").read_bytes()
            == Path("whole/adapter.safetensors").read_bytes())
    assert result_of("run")["after"] == result_of("whole")["after"]


def test_adapters_of_peft_with_a_head_train_on(empty_folder):
    flags, base = write_rte(Path()), base_of("deberta-v3")
    train.main(["--method", "lora", "--model", str(base), *flags, *SHORT])
    convert.main(["--run", "run", "--peft", "adapter"])
    shutil.move("run", "first")
    train.main(["--from-peft", "adapter", "--model", str(base), *flags, *SHORT])
    before, after = result_of("run")["before"], result_of("first")["after"]
    assert before == after
    assert result_of("run")["whole"] == result_of("first")["whole"]


def test_the_files_of_a_run_say_the_labels(empty_folder):
    train.main(["--method", "lora", "--model", str(base_of("deberta-v3")), *write_rte(Path()),
                *SHORT])
    convert.main(["--run", "run", "--to", "merged"])
    raw = json.loads(Path("merged/config.json").read_text())
    assert raw["id2label"] == {"0": "not_entailment", "1": "entailment"}
    assert raw["architectures"] == ["DebertaV2ForSequenceClassification"]


def test_a_head_of_peft_s_adapters_that_the_run_has_no_use_for_is_refused(empty_folder, capsys):
    model = inject(load_pretrained(BASE)[0].add_head(2), "lora", ["q"], rank=2, whole=["score"])
    export_peft(model, "adapter")
    for more in ([], write_rte(Path())):
        said = refused(capsys, "--from-peft", "adapter", "--out", "run", *more)
        assert "brings a head for labels" in said and ("--head" in said) == bool(more)
    assert not Path("run").exists()
