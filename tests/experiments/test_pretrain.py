"""How the base is trained: drills that follow their rules, text that depends on the step alone."""
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import BASE
from runs import interrupt

from data.pretraining_text import FIRST_MIX, MIX, documents
from data.task import Scores, Sequence, collate
from data.world import World
from experiments import pretrain
from formats.bpe_files import save_ranks
from formats.checkpoint import load_pretrained
from model import Transformer

pytestmark = pytest.mark.slow


def test_heads_start_by_attending_to_equal_tokens():
    model = Transformer(pretrain.config())
    pretrain.init_weights(model, 0)
    for layer in model.layers:
        assert torch.equal(layer.attn.q.weight, layer.attn.k.weight)
    weight = model.layers[0].mlp.down.weight                # 1 / sqrt(fan_in * 2 layers)
    assert weight.std().item() == pytest.approx((352 * 8) ** -0.5, rel=0.02)
    x = torch.nn.functional.rms_norm(model.embed.weight[:200], (128,))
    scores = model.layers[0].attn.q(x) @ model.layers[0].attn.k(x).T
    assert (scores.argmax(1) == torch.arange(200)).all()


def test_drills_follow_their_rules():
    (repeat, r), (label, l), (double, d) = pretrain.drills(0, 7)
    assert torch.equal(repeat[:, :32], repeat[:, 32:])
    assert torch.equal(repeat[r], repeat[:, 33:].flatten())
    for block in label.view(64, 11):
        listed = dict(zip(block[1:8:2].tolist(), block[0:8:2].tolist()))
        if len(listed) == 4:
            assert listed[block[9].item()] == block[10]
    assert torch.equal(label[l].view(64), label.view(64, 11)[:, 10])
    blocks, verdicts = double.view(128, 6), double[d]
    seen = (blocks[:, :4] == blocks[:, 4:5]).any(1)
    assert torch.equal(blocks[:, 5], verdicts) and verdicts.unique().numel() == 2
    assert (seen == (verdicts == verdicts.min())).float().mean() > 0.97     # chance repeats
    assert all(tokens.max() < pretrain.VOCAB for tokens in (repeat, label, double))
    assert 0.4 < seen.float().mean() < 0.6
    assert repeat.max() > pretrain.VOCAB - 9 > max(label[~l].max(), double[~d].max()) - 5
    for seed, step in ((0, 8), (1, 7)):
        assert not torch.equal(pretrain.drills(seed, step)[0][0], repeat)
    start = pretrain.START_STEPS
    assert [len(pretrain.drills(0, start + i)) for i in range(-1, 6)] == [3, 1, 0, 0, 0, 1, 0]
    (again, a), = pretrain.drills(0, start)
    assert torch.equal(again[:, :32], again[:, 32:]) and a.sum() == r.sum()


def test_no_two_tokens_of_the_base_are_alike(base):
    """What is never a target ends up as the same vector for all: then nothing can write it."""
    weight = torch.nn.functional.normalize(base[0].embed.weight, dim=1)
    cosines = weight @ weight.T - torch.eye(len(weight))
    assert cosines.max() < 0.95


def test_groups_hold_every_sequence_once_with_little_padding():
    rng = random.Random(0)
    sequences = [Sequence([i] * (5 + int(rng.random() ** 3 * 200)), 1) for i in range(150)]
    groups = pretrain.groups_by_length(sequences)
    assert sorted(s.tokens[0] for group in groups for s in group) == list(range(150))
    padded = sum(len(group) * max(len(s.tokens) for s in group) for group in groups)
    assert padded < 1.3 * sum(len(s.tokens) for s in sequences) and len(groups) < 20


def test_the_rate_rises_then_falls_to_a_tenth():
    peak = pretrain.PEAK_LR
    rates = [pretrain.learning_rate(step, 1101, peak) for step in (0, 49, 99, 100, 600, 1100)]
    assert rates == pytest.approx([peak / 100, peak / 2, peak, peak, 0.55 * peak, 0.101 * peak],
                                  rel=0.01)


def test_the_text_depends_on_the_step_and_counts_answers_only(base, monkeypatch):
    tokenizer, mixes = base[1], []

    def spy(world, rng, n, mix):
        mixes.append(mix)
        return documents(world, rng, n, mix)

    monkeypatch.setattr(pretrain, "documents", spy)
    one, again, later, other = (pretrain.text_of_step(World(), tokenizer, seed, step) for seed, step in
                                ((0, pretrain.START_STEPS - 1), (0, pretrain.START_STEPS - 1),
                                 (0, pretrain.START_STEPS), (1, pretrain.START_STEPS)))
    assert mixes == [FIRST_MIX, FIRST_MIX, MIX, MIX] and one == again and later != other
    for sequences in (one, later):
        assert pretrain.TOKENS <= sum(len(s.tokens) for s in sequences) < pretrain.TOKENS + 256
        prompts = [tokenizer.decode(s.tokens[1:s.start]) for s in sequences]
        assert all(p.endswith(("\nAnswer:", "\nDescription:")) for p in prompts if p)
        assert 0 < prompts.count("") < len(prompts)


def test_a_step_is_adamw_on_the_text_s_loss_and_the_drills(base, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "TOKENS", 200)
    monkeypatch.setattr(pretrain, "START_STEPS", 1)
    monkeypatch.setattr(pretrain, "report_scores", lambda *_: {})
    pretrain.main(["--steps", "2", "--out", str(tmp_path)])
    trained, tokenizer = load_pretrained(tmp_path)
    model = Transformer(pretrain.config())
    pretrain.init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step, rate in ((0, 2e-5), (1, 4e-5)):
        tokens, is_target = collate(pretrain.text_of_step(World(), tokenizer, 0, step))
        loss = cross_entropy(model, tokens, is_target)
        if step == 0:
            loss = loss + 0.3 * sum(cross_entropy(model, *drill) for drill in pretrain.drills(0, 0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for ours, theirs in zip(trained.parameters(), model.parameters()):
        assert (ours - theirs).abs().max() < 2e-6


def cross_entropy(model, tokens, is_target):
    logits, gold = model(tokens[:, :-1]), tokens[:, 1:].clone()
    gold[~is_target[:, 1:]] = -100
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), gold.flatten())


def test_the_report_covers_every_kind_and_gives_no_answer_away(base, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrain, "recall", lambda model, setup, examples:
                        asked.extend(examples) or Scores({}, {}, []))
    world = World(people=30, places=20)
    pretrain.report_scores(*base, world)
    groups = Counter(e.group for e in asked)
    for kind in ("yes_no", "same", "which", "choice", "two_hop"):
        for who in ("taught", "untaught"):
            assert groups[f"{kind} rests, {who}"] == groups[f"{kind}, {who}"] == 200
            assert all(any(name in e.prompt for name in getattr(world, who)) for e in asked
                       if e.group == f"{kind}, {who}")
    assert all(e.prompt.endswith((", so", ", so the answer is")) and e.target.endswith(".")
               for e in asked if e.group in ("which, taught", "choice, untaught"))


def test_the_tokenizer_that_ships_is_the_one_this_text_gives(tmp_path):
    world = World()
    ranks = pretrain.learn_pieces(world)
    save_ranks(ranks, tmp_path / "base.tiktoken")
    assert (BASE / "base.tiktoken").read_bytes() == (tmp_path / "base.tiktoken").read_bytes()
    for word in {word for fact in world.facts for word in fact.value.split()}:
        assert f" {word}".encode() in ranks


def test_a_stopped_run_goes_on_to_the_same_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "TOKENS", 300)
    monkeypatch.setattr(pretrain, "EVERY", 2)
    monkeypatch.setattr(pretrain, "START_STEPS", 1)
    monkeypatch.setattr(pretrain, "report_scores", lambda *_: {})
    flags = ["--steps", "4", "--seed", "3", "--out"]
    pretrain.main([*flags, str(tmp_path / "whole")])
    calls = interrupt(monkeypatch, pretrain, "text_of_step", 4)
    with pytest.raises(SystemExit):
        pretrain.main([*flags, str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        pretrain.main(["--steps", "5", *flags[2:], str(tmp_path / "stopped")])
    assert "--seed 3 --steps 4" in capsys.readouterr().err
    pretrain.main([*flags, str(tmp_path / "stopped")])
    assert [args[-1] for args in calls] == [0, 1, 2, 3, 2, 3]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes()
                for name in ("whole", "stopped"))
    assert one == two and not (tmp_path / "stopped" / "pretrain.pt").exists()
    model, tokenizer = load_pretrained(tmp_path / "whole")
    assert tokenizer.decode(tokenizer.encode("Ada Kelsen, 7.")) == "Ada Kelsen, 7."


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "--steps 0"), (["--seed", "-1"], "--seed -1"), (["--seed", "x"], "--seed"),
    (["--out", "damaged"], "pretrain.pt: cannot be read"), (["--out", "file"], "cannot write")])
def test_wrong_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("damaged").mkdir()
    for name in ("damaged/pretrain.pt", "file"):
        Path(name).write_text("no checkpoint")
    with pytest.raises(SystemExit) as end:
        pretrain.main(flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(error) == 1 and message in error[0]
