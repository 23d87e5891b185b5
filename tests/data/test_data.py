import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BASE
from runs import setup_of

from data import load_task
from data.reading import hold_out, split_file
from data.scoring import choice_losses, recall, score_targets
from data.task import (Example, Sequence, TextTask, collate, encode, encode_prompt, encode_start,
                       encode_targets, sample, target_loss)
from data.text import Text
from data.world import World, cloze
from formats.checkpoint import load_pretrained
from generate import generate
from model import Transformer
from support.errors import UserError


def test_an_example_is_bos_prompt_target_eos_and_the_loss_counts_the_answer(base):
    _, tokenizer = base
    tokens, start, cut, apart = encode(Example("Ada lives in", " Dunham."), tokenizer, 99)
    assert tokens == [tokenizer.bos, *tokenizer.encode("Ada lives in Dunham."), tokenizer.eos]
    assert tokenizer.decode(tokens[start:-1]) == " Dunham." and not cut and not apart
    assert encode(Example("Ada lives in", " Dunham."), tokenizer, 99, loss_on="all").start == 1
    assert encode(Example("a", " b"), tokenizer, 99, eos=False).tokens[-1] != tokenizer.eos


def test_too_long_an_example_loses_the_start_of_its_prompt_and_nothing_else(base):
    _, tokenizer = base
    example = Example("one two three four five six seven eight nine ten", " eleven.")
    whole = encode(example, tokenizer, 99)
    short = encode(example, tokenizer, len(whole.tokens) - 3)
    assert short.cut and not whole.cut
    assert short.tokens == [tokenizer.bos, *whole.tokens[4:]]
    assert short.tokens[short.start:] == whole.tokens[whole.start:]
    with pytest.raises(UserError, match="--max-length 3"):
        encode(example, tokenizer, 3)


def test_all_choices_are_read_after_the_same_prompt(base):
    model, tokenizer = base
    prompt = "one two three four five six seven eight nine ten"
    example = Example(prompt, " b", choices=(" b", " eleven twelve thirteen fourteen", " c d"))
    whole = encode(example, tokenizer, 99)
    size = max(len(encode(Example(prompt, choice), tokenizer, 99).tokens)
               for choice in example.choices)
    sequences = encode_targets(example, example.choices, tokenizer, size - 3)
    assert [len(s.tokens) == size - 3 for s in sequences] == [False, True, False]
    for choice, (tokens, start, cut, _) in zip(example.choices, sequences):
        assert cut and tokens[:start] == [tokenizer.bos, *whole.tokens[4:whole.start]]
        assert tokenizer.decode(tokens[start:-1]) == choice
    alone = encode(example, tokenizer, size - 3)                        # which need not be cut
    assert choice_losses(model, setup_of(*base, size - 3), [example])[0][0] != pytest.approx(
        score_targets(model, [alone], 1)[0].loss, rel=1e-6)
    with pytest.raises(UserError, match="--max-length 6.*eleven"):
        encode_targets(example, example.choices, tokenizer, 6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_read_once_gives_each_choice_the_loss_that_it_has_alone(base, family):
    """The prompts differ in length, one has bos alone; so do the choices, in length and number."""
    model, tokenizer = base
    if family == "gpt2":
        c = model.config
        model = Transformer(replace(c, model_type="gpt2", qkv_bias=True, o_bias=True, mlp_bias=True,
                                    n_kv_heads=c.n_heads)).init_weights()
    examples = [Example(prompt, choices[0], choices) for prompt, choices in (
        ("Question: Where does Ann live? Answer:", (" here", " there and everywhere", " no")),
        ("", ("A", "The end")), ("One two three", (" four",)),
        ("Ann's pet is", (" a cat", " a dog", " a dog and a cat")))]
    alone = [[score_targets(model, [s], 1)[0].loss
              for s in encode_targets(e, e.choices, tokenizer, 99)] for e in examples]
    for batch_size in (1, 6, 99):
        setup = setup_of(model, tokenizer, 99, batch_size=batch_size)
        losses = choice_losses(model, setup, examples)
        assert [len(row) for row in losses] == [3, 2, 1, 3]
        assert sum(losses, []) == pytest.approx(sum(alone, []), rel=1e-5)
    # a long prompt beside a long choice: padding takes no positions, of which there are no more
    model = Transformer(replace(model.config, max_positions=32, n_kv_heads=model.config.n_heads))
    model.init_weights()
    examples = [Example("Ann " * 20, " no", (" no", " yes")),
                Example("Ann", " no" * 20, (" no" * 20, " yes"))]
    alone, together = (choice_losses(
        model, setup_of(model, tokenizer, 32, batch_size=size), examples) for size in (1, 99))
    assert sum(together, []) == pytest.approx(sum(alone, []), rel=1e-5)


@pytest.mark.parametrize("prompt, target, apart", [
    ("Question", ": Who", False), ("Colour c:", " blue", False),
    ("Colour c: ", "blue", True), ("The Ans", "wer", True)])
def test_a_prompt_has_the_tokens_that_it_has_alone(base, prompt, target, apart):
    _, tokenizer = base
    alone, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + target)
    assert (joint[:len(alone)] != alone) == apart           # the tokenizer joins over the border
    found = encode(Example(prompt, target), tokenizer, 99)
    assert found.apart == apart and found.start == 1 + len(alone)
    assert found.tokens == [tokenizer.bos, *(alone + tokenizer.encode(target) if apart else joint),
                            tokenizer.eos]
    assert found.tokens[:found.start] == encode_prompt(Example(prompt, target),
                                                       setup_of(*base), 1).tokens


def test_bos_and_eos_that_stand_in_the_text_are_not_doubled(base):
    _, tokenizer = base
    bos, eos = tokenizer.decode([tokenizer.bos]), tokenizer.decode([tokenizer.eos])
    plain = encode(Example("Ada lives in", " Dunham."), tokenizer, 99)
    assert encode(Example(f"{bos}Ada lives in", f" Dunham.{eos}"), tokenizer, 99) == plain
    setup = setup_of(*base)
    assert encode_prompt(Example(f"{bos}Ada", ""), setup, 1) == encode_prompt(Example("Ada", ""),
                                                                              setup, 1)
    with pytest.raises(UserError, match="no tokens"):
        encode(Example("Ada", ""), tokenizer, 99, eos=False)


def test_exact_is_what_greedy_decoding_writes_after_the_prompt(base):
    model, tokenizer = base
    task = load_task("facts", setup_of(*base))
    old = [e for e in task.test if e.group == "kept"][:20]
    rows = [*old, *(replace(e, prompt=f"{e.prompt} ", target=e.target.strip()) for e in old[:5])]
    right = [row["right"] for row in task.score(model, rows).predictions]
    for e, said in zip(rows, right):
        prompt = encode_prompt(e, task.setup, 20).tokens
        target = encode(e, tokenizer, 99, eos=False).tokens[len(prompt):]
        assert said == (generate(model, [prompt], len(target), eos=[])[0] == target)
    assert 0 < sum(right) < len(rows)
    # jsonl asks for the end too
    own = Text("jsonl", rows, rows, rows, task.setup, {})
    right = [row["right"] for row in own.score(model, rows).predictions]
    for e, said in zip(rows, right):
        target = tokenizer.encode(e.target)
        written = generate(model, [encode_prompt(e, task.setup, 20).tokens], len(target) + 1)[0]
        assert said == (written == target)
    assert 0 < sum(right) < len(rows)


def test_any_eos_of_the_model_is_right_in_the_place_of_another(base):
    """The model's second eos is what it writes after a text; the tokenizer's is the first."""
    model, tokenizer = base
    prompt = encode_start("Question: Where does", tokenizer)
    *text, end = generate(model, [prompt], 5, eos=[])[0]
    asked = Sequence([*prompt, *text, tokenizer.eos], len(prompt))
    assert tokenizer.eos != end and not score_targets(model, [asked], 1)[0].right
    other = load_pretrained(BASE)[0]
    other.config.eos = [tokenizer.eos, end]
    assert score_targets(other, [asked], 1)[0].right
    assert generate(other, [prompt], 5)[0] == text


def test_the_loss_is_the_sum_over_target_tokens_whatever_the_padding(base):
    model, _ = base
    sequences = [Sequence([5, 6, 7, 8, 9], 3), Sequence([5, 9], 1), Sequence([1, 2, 3], 2)]
    by_hand = 0.0
    for tokens, start, *_ in sequences:
        logp = F.log_softmax(model(torch.tensor([tokens]))[0], -1)
        by_hand -= sum(logp[i - 1, tokens[i]] for i in range(start, len(tokens)))
    assert target_loss(model, *collate(sequences)).item() == pytest.approx(by_hand.item(), 1e-5)
    scores = score_targets(model, sequences, batch_size=2)
    assert sum(s.loss for s in scores) == pytest.approx(by_hand.item(), 1e-5)
    assert [s.tokens for s in scores] == [2, 1, 1]


def test_right_means_that_greedy_decoding_writes_the_target(base):
    model, tokenizer = base
    prompt = [tokenizer.bos, *tokenizer.encode("Question: Where does")]
    written = generate(model, [prompt], 4, eos=[])[0]
    right = Sequence(prompt + written, len(prompt))
    wrong = Sequence(prompt + written[:-1] + [(written[-1] + 1) % 1500], len(prompt))
    assert [s.right for s in score_targets(model, [right, wrong], 2)] == [True, False]


def test_scores_do_not_depend_on_the_batch_size(base):
    model, tokenizer = base
    task = load_task("facts", setup_of(model, tokenizer, 256))
    few = task.test[::40]
    one, many = (recall(model, setup_of(*base, batch_size=size), few) for size in (1, 64))
    assert one == many


def test_the_base_knows_its_world(base):
    model, tokenizer = base
    before = recall(model, setup_of(*base), load_task("facts", setup_of(*base)).valid).values
    assert before["kept"] > 0.95 and before["new"] < 0.05 and before["paraphrase"] < 0.05


def test_facts_splits_score_every_fact_once(base):
    task = load_task("facts", setup_of(*base, 256))
    prompts = [e.prompt for e in task.test + task.valid]
    assert len(set(prompts)) == len(prompts)
    rewritten = {e.prompt for e in task.train}
    for example in task.valid + task.test:
        assert (example.prompt in rewritten) == (example.group == "new")
    old = {cloze(fact, 0) for fact in World().facts}
    assert all(((e.prompt, e.target) in old) == (e.group == "rehearsed") for e in task.train)
    assert all((e.prompt, e.target) in old for e in task.test if e.group == "kept")


def test_kept_facts_are_of_relations_that_fine_tuning_changes(base):
    task = load_task("facts", setup_of(*base, 256))
    relation = {cloze(fact, 0): fact.relation for fact in World().facts}
    kept = {relation[e.prompt, e.target] for e in task.test if e.group == "kept"}
    assert kept == {"home", "job", "pet", "food", "instrument", "colour", "month"}


def test_large_batches_are_scored_in_parts_with_the_same_result(base):
    model, tokenizer = base
    long = [Sequence([1534] + [i % 1500] * 300, 1) for i in range(16)]      # 4,800 target tokens
    together, alone = (score_targets(model, long, size) for size in (16, 1))
    assert [s.loss for s in together] == pytest.approx([s.loss for s in alone], rel=1e-5)
    assert [s.tokens for s in together] == [300] * 16


def test_without_bos_the_first_token_is_read_and_the_target_stays_whole(base):
    class NoBos:
        bos, eos, encode = None, 1535, base[1].encode
    tokens, start, cut, _ = encode(Example("Ada lives in", " Dunham."), NoBos, 99)
    assert tokens == [*NoBos.encode("Ada lives in Dunham."), 1535] and not cut
    assert base[1].decode(tokens[start:-1]) == " Dunham."
    target = len(tokens) - start
    tokens, start, cut, _ = encode(Example("Ada lives in", " Dunham."), NoBos, target + 1)
    assert (len(tokens), start, cut) == (target + 1, 1, True)
    with pytest.raises(UserError, match="bos"):
        encode(Example("", "Dunham."), NoBos, 99)


def test_a_tokenizer_of_another_model_is_an_error(base):
    model = load_pretrained(BASE)[0]
    model.config.vocab_size = 100
    with pytest.raises(UserError, match="belong together"):
        TextTask("t", [], [], [], setup_of(model, base[1]), {}).sequence(Example("Ada", " lives"))


def test_a_file_is_split_eight_one_one():
    train, valid, test = split_file(list(range(100)))
    assert (train, valid, test) == (list(range(80)), list(range(80, 90)), list(range(90, 100)))
    assert split_file([0, 1, 2]) == ([0], [1], [2])


def test_rows_held_out_are_evenly_spread_and_no_longer_trained_on():
    rest, held = hold_out(list(range(100)), 5, "file")
    assert held == [0, 20, 40, 60, 80] and sorted(rest + held) == list(range(100))
    assert hold_out([1, 2, 3], 480, "file") == ([2, 3], [1])        # one at least, a tenth at most
    assert len(hold_out(list(range(1000)), 480, "file")[1]) == 100
    assert len(hold_out(list(range(30000)), 1000, "file")[1]) == 1000
    with pytest.raises(UserError, match="file: fewer than 2 examples"):
        hold_out([1], 5, "file")


def test_a_sample_takes_as_many_of_each_group_and_none_twice():
    groups = [Example(str(i), "", group="small" if i < 3 else "large") for i in range(33)]
    taken = [int(example.prompt) for example in sample(groups, 20)]
    assert taken == [0, 1, 2, *range(3, 33, 3)]


@pytest.mark.parametrize("name", ["commonsense", "e2e", "glue/rte"])
def test_a_task_of_files_needs_a_folder(name):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_task(name, setup_of())


def test_blocks_of_text_hold_each_token_once(base, tmp_path):
    _, tokenizer = base
    text = "".join(f"line {i} of the text\n" for i in range(300))
    (tmp_path / "t.txt").write_text(text)
    task = load_task("text", setup_of(*base, 32), data=str(tmp_path / "t.txt"))
    ids = [t for block in task.train + task.valid + task.test for t in block.tokens[1:]]
    assert ids == tokenizer.encode(text)
    assert all(block.tokens[0] == tokenizer.bos and len(block.tokens) <= 32
               for block in task.train + task.valid + task.test)


@pytest.mark.parametrize("line", [
    "{", "[1]", "3", "null", '{"prompt": "a"}', '{"prompt": 1, "target": "b"}',
    '{"prompt": "a", "target": ""}', "[" * 100000])
def test_each_kind_of_wrong_line_is_named(line, base, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "a", "target": "b"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"d\.jsonl:2: "):
        load_task("jsonl", setup_of(*base, 256), data=str(path))


def test_text_that_is_not_utf8_or_too_short_is_an_error(base, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfabc\r\n\xff")              # behind a byte order mark
    with pytest.raises(UserError, match=r"t\.txt:2: not UTF-8"):
        load_task("text", setup_of(*base, 256), data=str(path))
    path.write_text("short")
    with pytest.raises(UserError, match="too few"):
        load_task("text", setup_of(*base, 256), data=str(path))
