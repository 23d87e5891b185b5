"""How the encoder is trained: rows that depend on the step alone, masks and replaced tokens."""
import random
from collections import Counter

import pytest
import torch
from conftest import BASE
from runs import interrupt
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data.world import World
from experiments import pretrain
from experiments import pretrain_encoder as ours
from experiments.pretrain_encoder import END, FIRST, MAKERS, MASK, MASKED, MASKED_IN_PAIRS, START
from formats.bpe_files import read_ranks, save_roberta_json
from formats.checkpoint import load_pretrained
from formats.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_roberta_json(read_ranks(BASE / "base.tiktoken"), folder / "tokenizer.json")
    return load_tokenizer(folder)


def rows_of(kind, world, tokenizer, n=300):
    rng = random.Random("test")
    return [MAKERS[kind][1](world, rng, tokenizer.encode) for _ in range(n)]


def parts(row):
    """Returns the texts of a pair with the masks filled in, and where the second begins."""
    tokens = [row.hidden.get(i, token) for i, token in enumerate(row.tokens)]
    cut = tokens.index(END)
    assert tokens[0] == START and tokens[cut + 1] == END == tokens[-1]
    return tokens[1:cut], tokens[cut + 2:-1], cut + 2


def test_the_tokenizer_s_ids_are_those_of_the_library(tokenizer):
    theirs = Tokenizer.from_file(str(tokenizer.path))
    texts = ["Ada Kelsen lives in Brenham.", " two  spaces", "it's naïve, 7 <mask>s", ""]
    for text in texts:
        assert [0, *tokenizer.encode(text), 2] == theirs.encode(text).ids
    pair = [0, *tokenizer.encode("Ada sings."), 2, 2, *tokenizer.encode("Ada."), 2]
    assert theirs.encode("Ada sings.", "Ada.").ids == pair
    assert tokenizer.encode("Ada")[0] == tokenizer.encode("I see Ada")[-1]
    assert theirs.get_vocab_size() == MASK + 1 and theirs.token_to_id("<mask>") == MASK


def test_heads_start_by_attending_to_equal_tokens_wherever_they_stand():
    model = ours.Pretraining(ours.config())
    ours.init_weights(model, 0)
    encoder, tokens = model.encoder, torch.randperm(2000)[:16] + FIRST
    for layer in encoder.layers:
        assert torch.equal(layer.attn.q.weight, layer.attn.k.weight)
    x = encoder.embed_norm(encoder.embed(tokens.repeat(2)) + encoder.positions.weight[2:34])
    attn = encoder.layers[0].attn
    best = (attn.q(x) @ attn.k(x).T).topk(2).indices.sort().values
    assert torch.equal(best, torch.arange(16).repeat(2)[:, None] + torch.tensor([0, 16]))


def test_rows_depend_on_the_seed_and_the_step_alone(world, tokenizer):
    one, again, other, later = (ours.rows_of_step(world, tokenizer.encode, *numbers)
                                for numbers in ((0, 5), (0, 5), (1, 5), (0, 6)))
    assert one == again and one != other and one != later
    assert ours.TOKENS <= sum(len(row.tokens) for row in one) < ours.TOKENS + ours.LENGTH


def test_rows_fit_the_model(world, tokenizer):
    for kind in MAKERS:
        assert max(len(row.tokens) for row in rows_of(kind, world, tokenizer)) <= ours.LENGTH


def test_the_shares_of_masks_are_as_said(world, tokenizer):
    rows = rows_of("sentence", world, tokenizer, 600)
    free = sum(len(row.tokens) - 2 - len(row.replaced) for row in rows)
    assert sum(len(row.hidden) for row in rows) / free == pytest.approx(MASKED, abs=0.015)
    for kind in ("one told", "two told"):
        rows = [row for row in rows_of(kind, world, tokenizer, 900) if row.hidden]
        free = 0
        for row in rows:
            _, second, start = parts(row)
            assert min(row.hidden) >= start and not row.replaced & row.hidden.keys()
            free += len(second) - len(row.replaced)
        # rows without a mask are left out, so the share is a little higher
        assert MASKED_IN_PAIRS - 0.02 < sum(len(row.hidden) for row in rows) / free < 0.38
    for row in rows:
        assert {i for i, token in enumerate(row.tokens) if token == MASK} == row.hidden.keys()


def test_only_the_first_text_tells_what_was_replaced(world, tokenizer):
    """In a drill a replaced token is a new one; after two facts it is the other one's value."""
    for row in rows_of("drill", world, tokenizer):
        first, second, start = parts(row)
        for i, token in enumerate(second):
            assert (token not in first) == (start + i in row.replaced)
    values, replaced = Counter(), 0
    for row in rows_of("two told", world, tokenizer):
        first, second, start = parts(row)
        assert all(second[i - start] in first for i in row.replaced)
        replaced += bool(row.replaced)
        assert len({row.tokens[i] for i in row.replaced}) <= 2         # a name has two tokens
        values[len(row.replaced)] += 1
    assert 0.4 < replaced / 300 < 0.6 and set(values) <= {0, 1, 2}


def test_a_second_text_errs_in_one_thing(world, tokenizer):
    """An error is one value, one subject or another relation, all of whose new tokens count."""
    sizes = Counter()
    for row in rows_of("one told", world, tokenizer):
        first, second, start = parts(row)
        new = {start + i for i, token in enumerate(second) if token not in first}
        assert row.replaced <= new
        sizes[len(row.replaced) if len(row.replaced) < 3 else "relation"] += 1
        if len(row.replaced) > 2:
            assert row.replaced == new and not row.hidden
    assert set(sizes) == {0, 1, 2, "relation"} and 0.4 < sizes[0] / 300 < 0.6


def test_a_batch_judges_the_tokens_of_the_texts_alone():
    row = ours.Row([START, 9, MASK, 7, END], {2: 8}, {3})
    tokens, words, verdicts = ours.collate([row, ours.Row([START, 5, END], {}, set())])
    assert tokens.tolist() == [[0, 9, MASK, 7, 2], [0, 5, 2, 1, 1]]
    assert words.tolist() == [[-100, -100, 8, -100, -100], [-100] * 5]
    assert verdicts.tolist() == [[-1, 0, -1, 1, -1], [-1, 0, -1, -1, -1]]


def test_the_losses_are_those_of_each_row_alone(world, tokenizer):
    model = ours.Pretraining(ours.config())
    ours.init_weights(model, 0)
    rows = ours.rows_of_step(world, tokenizer.encode, 0, 0)[:12]
    alone = torch.stack([ours.summed_losses(model, [row]) for row in rows]).sum(0)
    assert torch.allclose(ours.summed_losses(model, rows), alone, rtol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "TOKENS", 200)
    monkeypatch.setattr(pretrain, "EVERY", 2)
    monkeypatch.setattr(ours, "report_scores", lambda *_: {})
    ours.main(["--steps", "4", "--out", str(tmp_path / "whole")])
    calls = interrupt(monkeypatch, ours, "rows_of_step", 4)
    with pytest.raises(SystemExit):
        ours.main(["--steps", "4", "--out", str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    ours.main(["--steps", "4", "--out", str(tmp_path / "stopped")])
    assert [args[-1] for args in calls] == [0, 1, 2, 3, 2, 3]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    model, tokenizer = load_pretrained(tmp_path / "whole")
    assert model.config == ours.config() and tokenizer.mask == ours.MASK


def test_the_report_has_every_kind_of_row(world, tokenizer):
    model = ours.Pretraining(ours.config())
    ours.init_weights(model, 0)
    scores = ours.report_scores(model, world, tokenizer.encode)
    assert len(scores) == 3 * len(MAKERS) - 1               # drills hide no words
    assert all(0 <= share <= 1 for share in scores.values())
