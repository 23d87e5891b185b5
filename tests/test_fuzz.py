"""Checks that a reader of any damaged file gives a result or one clear line (UserError).

Each example damages a good file: bytes are flipped, cut or doubled, or a value in JSON is replaced.
FUZZ=5000 pytest tests/test_fuzz.py tries 5,000 examples of each file.
"""
import copy
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import BASE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import setup_of
from safetensors.torch import load_file, save_file

from data import load_task
from data.reading import read_template
from data.rows import read_examples
from formats.checkpoint import load_pretrained, save_pretrained
from formats.peft import export_peft, import_peft
from formats.tokenizer import load_tokenizer
from methods import inject, load, param_groups, save
from model import Config, Transformer
from support import flags as flags_of_train
from support import run
from support.errors import UserError
from support.run import Run

fuzzed = settings(max_examples=int(os.environ.get("FUZZ", 120)), deadline=None, database=None,
                  derandomize="FUZZ" not in os.environ,
                  suppress_health_check=list(HealthCheck))
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 300) | st.floats() | st.text()
    | st.sampled_from(["../x", "/etc/passwd", "LORA", "float32", "\ud800", "answer1", "q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=4)

pytestmark = pytest.mark.slow


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Damages bytes in up to three places."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 200)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "remove"]))
        size = draw(st.integers(1, 40))
        if kind == "flip" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from(
                [b"\n", b"\r", b"\t", b'"', b"\0", b"||", b"\xff", b"{", b"]", "\u2028".encode()]))
        elif kind == "double":
            data[at:at] = data[at:at + size]
        else:
            del data[at:at + size]
    return bytes(data)


@st.composite
def altered(draw, value):
    """Replaces, leaves out or adds one or two parts of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        here, depth = value, draw(st.integers(1, 6))
        while isinstance(here, (dict, list)) and len(here):
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            key = draw(st.sampled_from(keys[:200]))
            depth -= 1
            if depth == 0 or not isinstance(here[key], (dict, list)) or not here[key]:
                if draw(st.booleans()) and draw(st.booleans()):
                    del here[key]
                else:
                    here[key] = draw(ANY)
                break
            here = here[key]
    return value


def tried(reader) -> None:
    try:
        reader()
    except UserError as error:
        assert str(error).strip()


CONFIGS = {
    "llama": Config(vocab_size=97, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4,
                    d_ff=24, max_positions=64, tied=True, bos=1, eos=[2]),
    "gpt2": Config(model_type="gpt2", vocab_size=97, d_model=16, n_layers=2, n_heads=4,
                   n_kv_heads=4, head_dim=4, d_ff=24, max_positions=64, tied=True, qkv_bias=True,
                   o_bias=True, mlp_bias=True, bos=1, eos=[2]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Makes a folder of good files for every reader."""
    top = tmp_path_factory.mktemp("right")
    for name, config in CONFIGS.items():
        model = Transformer(config).init_weights()
        save_pretrained(model, top / name)
        inject(model, "lora", ["q", "up"], rank=2)
        save(model, top / name / "adapter.safetensors")
        export_peft(model, top / name / "peft")
    return top


def folder_with(folder: Path, name: str, content: bytes) -> tempfile.TemporaryDirectory:
    """Copies a folder of small files, with other content in one of them."""
    place = tempfile.TemporaryDirectory(prefix="fuzz")
    for path in folder.iterdir():
        if path.is_file():
            os.link(path, Path(place.name, path.name))
    target = Path(place.name, name)
    target.unlink(missing_ok=True)
    target.write_bytes(content)
    return place


def header(content: bytes) -> tuple[dict, bytes]:
    """Splits a safetensors file into its JSON header and the bytes after it."""
    size, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + size]), content[8 + size:]


def with_header(head: dict, rest: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + rest


@fuzzed
@given(data=st.data(), family=st.sampled_from(list(CONFIGS)))
def test_any_weights(files, data, family):
    content = (files / family / "model.safetensors").read_bytes()
    if data.draw(st.booleans()):
        head, rest = header(content)
        content = with_header(data.draw(altered(head)), rest)
    else:
        content = data.draw(damaged(content))
    with folder_with(files / family, "model.safetensors", content) as place:
        tried(lambda: load_pretrained(place))


@fuzzed
@given(data=st.data(), family=st.sampled_from(list(CONFIGS)))
def test_any_config(files, data, family):
    content = (files / family / "config.json").read_bytes()
    content = data.draw(damaged(content) | altered(json.loads(content)).map(
        lambda value: json.dumps(value).encode()))
    with folder_with(files / family, "config.json", content) as place:
        tried(lambda: load_pretrained(place))


@fuzzed
@given(data=st.data())
def test_any_index(files, data):
    weights = load_file(files / "llama" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{'ab'[i % 2]}.safetensors"
                                            for i, name in enumerate(weights)}}

    def write(place, content):
        Path(place, "model.safetensors.index.json").write_text(json.dumps(content))
        Path(place, "model.safetensors").unlink(missing_ok=True)
        for part in "ab":
            save_file({name: tensor for i, (name, tensor) in enumerate(weights.items())
                       if "ab"[i % 2] == part}, Path(place, f"{part}.safetensors"))
        load_pretrained(place)

    with folder_with(files / "llama", "x", b"") as place:
        write(place, index)                     # the right one is read
        tried(lambda: write(place, data.draw(altered(index))))


@fuzzed
@given(data=st.data())
def test_any_pickled_weights(files, data):
    model, _ = load_pretrained(files / "llama")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "pytorch_model.bin")
        torch.save({f"x{name}": tensor for name, tensor in model.state_dict().items()}, path)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        shutil.copy(files / "llama" / "config.json", place)
        tried(lambda: load_pretrained(place))


@fuzzed
@given(data=st.data(), family=st.sampled_from(list(CONFIGS)))
def test_any_adapter(files, data, family):
    content = (files / family / "adapter.safetensors").read_bytes()
    if data.draw(st.booleans()):
        head, rest = header(content)
        own = json.loads(head["__metadata__"]["adapter"])
        head["__metadata__"]["adapter"] = json.dumps(data.draw(altered(own)))
        content = with_header(head, rest)
    else:
        content = data.draw(damaged(content))
    model, _ = load_pretrained(files / family)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with folder_with(files / family, "adapter.safetensors", content) as place:
        try:
            load(model, Path(place, "adapter.safetensors"))
        except UserError:
            assert before == [(name, id(module)) for name, module in model.named_modules()]


@fuzzed
@given(data=st.data(), family=st.sampled_from(list(CONFIGS)))
def test_any_adapter_of_peft(files, data, family):
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = (files / family / "peft" / name).read_bytes()
    if name.endswith("json"):
        content = data.draw(damaged(content) | altered(json.loads(content)).map(
            lambda value: json.dumps(value).encode()))
    elif data.draw(st.booleans()):
        head, rest = header(content)
        content = with_header(data.draw(altered(head)), rest)
    else:
        content = data.draw(damaged(content))
    model, _ = load_pretrained(files / family)
    with folder_with(files / family / "peft", name, content) as place:
        tried(lambda: import_peft(model, place))


@fuzzed
@given(data=st.data())
def test_any_checkpoint_and_any_config_of_a_run(files, data):
    model = inject(load_pretrained(files / "llama")[0], "lora", ["q"], rank=2)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1))
    with tempfile.TemporaryDirectory() as place:
        args = vars(flags_of_train.parse_flags(["--method", "dora"]))
        args.pop("given")
        args |= dict(lr=0.01, steps=9, batch_size=2, warmup=0, eval_every=3, loss_on="answer",
                     max_length=64, command="python train.py --method dora")
        content = json.dumps({"args": args, "before": None, "versions": {}})
        Path(place, "config.json").write_text(content)
        assert reread(place).method == "dora"
        own = Run()
        own.folder = Path(place)
        own.checkpoint(model, optimizer, 3)
        path = Path(place, run.CHECKPOINT)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        tried(lambda: own.restore(model, optimizer))
        content = data.draw(altered(json.loads(content)).map(
            lambda value: json.dumps(value).encode()) | damaged(content.encode()))
        Path(place, "config.json").write_bytes(content)
        tried(lambda: reread(place))


def reread(folder):
    """Reads config.json as --resume does, before it loads anything."""
    return run.resumed(flags_of_train.parse_flags(["--resume", "--out", folder]))


# ---- tokenizers
def spec() -> dict:
    """Makes a byte-level tokenizer.json of a few merges."""
    letters = [chr(i) for i in range(33, 127)] + ["Ġ"]
    merges = ["a b", "Ġ a", "c d", "ab cd"]
    tokens = letters + [m.replace(" ", "") for m in merges]
    return {"added_tokens": [{"id": len(tokens), "content": "<s>", "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": merges}}


def used(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("abcd <s> x1"))
        if tokenizer.family:
            tokenizer.pair("abcd [MASK] x1", "b", 5)


def spec_of_pieces() -> dict:
    """Makes a tokenizer.json with "▁" for a space, of few merges and of all bytes."""
    merges = ["a b", "▁ a", "c d", "ab cd"]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcd",
              *(m.replace(" ", "") for m in merges), "<unk>"]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {"added_tokens": [{"id": len(tokens), "content": "<s>", "normalized": False}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                              "prepend_scheme": "first", "split": True},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": merges, "unk_token": "<unk>", "fuse_unk": True,
                      "byte_fallback": True}}


def spec_of_words() -> dict:
    """Makes a tokenizer.json of WordPiece."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*marks, "ab", "c", "x", "##c", "##d", "##1"]
    return {"added_tokens": [{"id": i, "content": t, "special": True, "normalized": False}
                             for i, t in enumerate(marks)],
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "strip_accents": None,
                           "handle_chinese_chars": True, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {"type": "WordPiece", "vocab": {t: i for i, t in enumerate(tokens)},
                      "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100}}


@pytest.mark.parametrize("make", [spec, spec_of_pieces, spec_of_words],
                         ids=["bytes", "pieces", "words"])
@fuzzed
@given(data=st.data())
def test_any_tokenizer_json(make, data):
    content = data.draw(damaged(json.dumps(make()).encode()) | altered(make()).map(
        lambda value: json.dumps(value).encode()))
    with tempfile.TemporaryDirectory() as place:
        Path(place, "tokenizer.json").write_bytes(content)
        tried(lambda: used(place))


@fuzzed
@given(data=st.data())
def test_any_vocabulary_and_merges(data):
    model = spec()["model"]
    files = {"vocab.json": json.dumps(model["vocab"]).encode(),
             "merges.txt": "\n".join(["#version: 0.2", *model["merges"]]).encode()}
    name = data.draw(st.sampled_from(list(files)))
    with tempfile.TemporaryDirectory() as place:
        for other, content in files.items():
            content = data.draw(damaged(content)) if other == name else content
            Path(place, other).write_bytes(content)
        tried(lambda: used(place))


@fuzzed
@given(data=st.data())
def test_any_vocab_txt_and_settings(data):
    vocab = "\n".join(spec_of_words()["model"]["vocab"]).encode()
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None,
                "mask_token": {"content": "[MASK]", "lstrip": True, "normalized": False},
                "added_tokens_decoder": {"4": {"content": "[MASK]", "rstrip": True,
                                               "special": True, "normalized": False}}}
    with tempfile.TemporaryDirectory() as place:
        Path(place, "vocab.txt").write_bytes(data.draw(damaged(vocab) | st.just(vocab)))
        Path(place, "tokenizer_config.json").write_text(json.dumps(data.draw(altered(settings))))
        tried(lambda: used(place))


@fuzzed
@given(data=st.data())
def test_any_rank_file(data):
    source, = BASE.glob("*.tiktoken")
    content = b"\n".join(source.read_bytes().split(b"\n")[:300]) + b"\n"
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(BASE / "config.json", place)
        Path(place, "x.tiktoken").write_bytes(data.draw(damaged(content)))
        tried(lambda: used(place))


@fuzzed
@given(data=st.data())
def test_any_sentencepiece_model(sentencepiece_model, data):
    with tempfile.TemporaryDirectory() as place:
        Path(place, "tokenizer.model").write_bytes(data.draw(damaged(sentencepiece_model)))
        tried(lambda: used(place))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("the cat sat on the mat and looked at the dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=60,
        model_type="bpe", minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="identity")
    return (folder / "m.model").read_bytes()


# ---- data
ROW = {"instruction": "Is it so?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
       "input": "", "output": "the correct answer is answer1", "answer": "answer1"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TASKS = {       # task -> the folder's files, or a file of its own; {} is the damaged one
    "jsonl": {"data.jsonl": b'{"prompt": "a", "target": "b"}\n' * 6},
    "jsonl array": {"data.json": json.dumps([{"instruction": "a", "input": "b", "output": "c"},
                                             CHAT] * 3).encode()},
    "text": {"data.txt": b"some words to learn from, and more of them. " * 20},
    "commonsense": {"boolq/test.json": json.dumps([ROW] * 2).encode(),
                    "boolq/train.json": json.dumps([ROW] * 4).encode()},
    "e2e": {f"{name}.txt": b"name : Alimentum | area : city centre||Alimentum is there .\n" * 3
            for name in ("train", "valid", "test")},
    "e2e csv": {f"{name}.csv": b'mr,ref\n"name[A], priceRange[\xc2\xa320-25]","A ""is"" it."\n' * 1
                for name in ("trainset", "devset", "testset_w_refs")},
    "glue/cola": {"train.tsv": b"gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n" * 9,
                  "dev.tsv": b"gj04\t1\t\tThe dog sat.\ngj04\t0\t*\tDog the.\n" * 3},
    "glue/sst2": {"train.tsv": b"sentence\tlabel\na good film\t1\na bad film\t0\n" * 1
                  + b"fine\t1\nawful\t0\n" * 9,
                  "dev.tsv": b"sentence\tlabel\nfine\t1\nawful\t0\n"},
}


@pytest.mark.parametrize("task", TASKS)
@fuzzed
@given(data=st.data())
def test_any_data(base, task, data):
    files = TASKS[task]
    name = data.draw(st.sampled_from(list(files)))
    with tempfile.TemporaryDirectory() as place:
        for other, content in files.items():
            path = Path(place, other)
            path.parent.mkdir(exist_ok=True)
            if other == name:
                kinds = damaged(content)
                if other.endswith(".json"):
                    kinds |= altered(json.loads(content)).map(lambda v: json.dumps(v).encode())
                content = data.draw(kinds)
            path.write_bytes(content)
        where = ({"data": str(path)} if task.split()[0] in ("jsonl", "text") else {"data_dir": place})
        tried(lambda: load_task(task.split()[0], setup_of(*base, 64), **where))


@fuzzed
@given(content=damaged(b"{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] | trim "
                       b"}}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"))
def test_any_chat_template(base, content):
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(BASE, place, dirs_exist_ok=True)
        Path(place, "chat_template.jinja").write_bytes(content)
        Path(place, "rows.jsonl").write_text(json.dumps(CHAT))
        tokenizer = load_tokenizer(place)
        tried(lambda: read_examples(str(Path(place, "rows.jsonl")), tokenizer))


@fuzzed
@given(content=st.binary(max_size=40) | damaged(b"Do this:\n{instruction}\nDone:"))
def test_any_template(content):
    with tempfile.TemporaryDirectory() as place:
        Path(place, "template").write_bytes(content)
        tried(lambda: read_template(str(Path(place, "template"))))
