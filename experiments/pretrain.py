"""Trains data/base, the small LLaMA-style model that ships, on text about the built-in world.

    python -m experiments.pretrain                  # the shipped base, from nothing
    python -m experiments.pretrain --steps 200 --out /tmp/base  # a quick look
A killed run goes on from its last checkpoint, since a step's text depends on the seed and the step
alone. Each document stands alone in its row. The loss of a question counts its answer only.

A model of this size shall not only know facts, but compare and look up what it has just written.
Four things help it:
    the words of values are a token each    the same word twice is the same token twice
    queries start as keys (init_weights)    heads that see equal tokens from the first step
    drills, most in the first 3,000 steps   rules on random tokens, beside the text
    answers say what they rest on           "Ada Kelsen lives in Brenham, so no."
Luck decides when such a skill forms. In the run that ships (seed 0, 50 minutes on one core) yes/no
and labels had left chance by step 2,000. `same` had not at the end. `which` had a little (0.65) on
the people that were asked about, but not on others. With --seed 1 none had by step 3,000.
"""
import hashlib
import json
import math
import random
import re
import tempfile
import time
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.mini import MATCH, splits
from data.pretraining_text import FIRST_MIX, MIX, QUESTIONS, documents
from data.reading import read_template
from data.scoring import recall
from data.task import Example, Sequence, Setup, collate, encode, target_loss
from data.wordings import KIND
from data.world import VERSION, World, cloze, pick_one, question
from formats.bpe_files import save_ranks
from formats.bpe_training import train_bpe
from formats.checkpoint import save_pretrained
from formats.tokenizer import load_tokenizer
from model import Config, Transformer
from support.errors import UserError, exit_on_user_error
from support.files import atomic_write
from support.parser import Parser
from support.run import ROOT

VOCAB = 2722                            # byte-level BPE: all pieces of the text, bos, eos
TOKENS, LENGTH = 2048, 256              # tokens of a step, and at most of a document
PEAK_LR, WARMUP = 2e-3, 100
START_STEPS, DRILL_WEIGHT = 3000, 0.3   # steps of the first phase, and the weight of each drill
EVERY = 500                             # steps between checkpoints


def config() -> Config:
    return Config(vocab_size=VOCAB, d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32,
                  d_ff=352, max_positions=512, bos=VOCAB - 2, eos=[VOCAB - 1])


def init_weights(model: Transformer, seed: int) -> None:
    """Draws the weights from N(0, 1 / fan_in) and makes W_k equal to W_q.

    Weights that write to the residual stream are divided by sqrt(2 layers). With W_q = W_k a head
    attends to tokens equal to its own from the first step, so it sees equality. Without it this
    took much longer to form. The idea is from "Mimetic initialization of self-attention layers"
    (Trockman & Kolter 2023, arXiv 2305.09828), which adds a multiple of the identity to W_q^T W_k.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            out = name.endswith(("attn.o.weight", "mlp.down.weight"))
            std = (weight.shape[1] * (2 * model.config.n_layers if out else 1)) ** -0.5
            torch.nn.init.normal_(weight, std=std, generator=generator)
    for layer in model.layers:
        layer.attn.k.weight.data.copy_(layer.attn.q.weight)


def learn_pieces(world: World) -> dict[bytes, int]:
    """Learns the tokenizer's ranks on documents, the training items of `mini` and all values.

    BoolQ's two words are left out. They came after the base was trained, and are spelt from pieces.
    """
    items = [*documents(world, random.Random("tokenizer"), 20000),
             *((e.prompt, e.target) for e in splits(read_template(None))["train"]),
             *(("", f" {value}") for relation in KIND for value in world.options(relation))]
    learnt = "\n".join(prompt + target for prompt, target in items)
    return train_bpe(re.sub("|".join(MATCH), "", learnt), VOCAB - 2)


def text_of_step(world: World, tokenizer, seed: int, step: int) -> list[Sequence]:
    """Writes the documents of one step."""
    rng, sequences, size = random.Random(f"pretrain-{seed}-{step}"), [], 0
    stream = documents(world, rng, 10 ** 9, FIRST_MIX if step < START_STEPS else MIX)
    while size < TOKENS:
        sequences.append(encode(Example(*next(stream)), tokenizer, LENGTH))
        size += len(sequences[-1].tokens)
    return sequences


def groups_by_length(sequences: list) -> list[list]:
    """Groups sequences of similar length, so that little of a batch is padding."""
    groups: list = []
    for sequence in sorted(sequences, key=lambda s: len(s.tokens)):
        n = len(sequence.tokens)
        if not groups or n > 1.3 * len(groups[-1][0].tokens) + 4 or n * len(groups[-1]) > 2500:
            groups.append([])
        groups[-1].append(sequence)
    return groups


def drills(seed: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """Draws random tokens under three rules -> (tokens, is_target) of each, as collate() does.

    repeat   32 tokens, then the same again; nothing tells the first of these
    label    four times a label and a token, then one of the tokens again and its label
    double   five tokens, then whether the fifth is one of the first four
    The loss counts what a rule decides. `label` comes 8 times a row, `double` 16 times. After
    START_STEPS `repeat` goes on at every fourth step. Without it, tokens that are never a target in
    the text would all become the same vector, and no adapter could make the model write them.
    """
    if step >= START_STEPS and step % 4:
        return []
    g = torch.Generator().manual_seed(seed * 10 ** 6 + step)
    marks = VOCAB - 9                   # the last seven before bos stand for labels and verdicts

    def tokens(end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=g)

    def rows(blocks: Tensor, counted: slice) -> tuple[Tensor, Tensor]:
        is_target = torch.zeros_like(blocks, dtype=torch.bool)
        is_target[..., counted] = True
        return blocks.flatten(1), is_target.flatten(1)

    half = tokens(VOCAB - 2, 16, 1, 32)
    repeat = rows(torch.cat([half, half], 2), slice(33, None))
    if step >= START_STEPS:
        return [repeat]
    listed, five = tokens(marks, 8, 8, 4), tokens(marks, 8, 16, 5)
    position = torch.randint(0, 4, (8, 8, 1), generator=g)
    labels = torch.arange(marks, marks + 4).expand(8, 8, 4)
    pairs = torch.stack([labels, listed], 3).flatten(2)
    asked = torch.cat([torch.full((8, 8, 1), marks + 4), listed.gather(2, position)], 2)
    one = torch.randint(0, 4, (8, 16, 1), generator=g)
    is_double = torch.rand(8, 16, 1, generator=g) < 0.5
    five[..., 4:] = torch.where(is_double, five.gather(2, one), five[..., 4:])
    verdict = torch.where(is_double, marks + 5, marks + 6)
    return [repeat, rows(torch.cat([pairs, asked, position + marks], 2), slice(-1, None)),
            rows(torch.cat([five, verdict], 2), slice(-1, None))]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises in a straight line, then falls along half a cosine to a tenth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def report_scores(model: Transformer, tokenizer, world: World) -> dict[str, float]:
    """Measures the share of items that the model writes exactly, for each kind of item.

    Statements and open questions are all asked, and their value counts. The other kinds are asked
    200 times each, on taught and on untaught people. There the reason counts, and the answer after
    it.
    """
    examples, untaught, rng = [], set(world.untaught), random.Random("report")
    for fact in world.facts:
        who = "untaught" if fact.subject in untaught else "taught"
        examples += [Example(*cloze(fact, i), group=f"statement {i}") for i in range(5)]
        examples += [Example(*question(fact, i), group=f"question, {who}") for i in range(3)]
    for who, kind in product(("taught", "untaught"), ("yes_no", "same", "which", "choice",
                                                      "two_hop")):
        relations = ("home", "pet") if kind == "two_hop" else ("home", "job", "pet", "food")
        for _ in range(200):
            fact = world.known[pick_one(rng, getattr(world, who)), pick_one(rng, relations)]
            prompt, target = QUESTIONS[kind][0](world, fact, rng)
            reason, so, answer = re.split("(, so(?: the answer is)?)", target)
            examples += [Example(prompt, reason, group=f"{kind} rests, {who}"),
                         Example(prompt + reason + so, answer, group=f"{kind}, {who}")]
    return recall(model, Setup(tokenizer, model.config, LENGTH, batch_size=256), examples).values


def save_base(model: Transformer, ranks: dict[bytes, int], folder: Path) -> None:
    save_pretrained(model, folder)
    save_ranks(ranks, folder / "base.tiktoken")


def parse_flags(doc: str, steps: int, size: str, out: Path, argv: list[str] | None) -> Namespace:
    """Reads --steps, --seed and --out. Raises UserError if a number is out of bounds."""
    parser = Parser(doc.split("\n")[0])
    parser.add_argument("--steps", type=int, default=steps,
                        help=f"optimizer steps of {size} ({steps})")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the initial weights and the data (0)")
    parser.add_argument("--out", type=Path, default=out,
                        help=f"folder to write ({out.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    return args


def train(model: nn.Module, args: Namespace, recipe, add_gradients: Callable[[int], float],
          report: Callable[[], dict[str, float]], keep: Callable[[], None],
          peak: float = PEAK_LR, every: int | None = None) -> None:
    """Trains the model, from its last checkpoint on if there is one, and prints its scores.

    recipe: all that decides the text and the model, to refuse a checkpoint of another run.
    add_gradients(step) runs backward on the step's loss, and returns the loss. keep() writes what
    ships. peak: the highest learning rate. every: steps between checkpoints (EVERY).
    Raises UserError if the checkpoint is damaged or of another run.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    checkpoint, first = args.out / "pretrain.pt", 0
    run = {"seed": args.seed, "steps": args.steps, "world": VERSION,
           "recipe": hashlib.sha256(repr(recipe).encode()).hexdigest()}

    def save(step: int) -> None:
        with atomic_write(checkpoint) as path, open(path, "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step, "run": run}, file)

    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True)
            theirs, first = state["run"], state["step"]
        except Exception:                   # a broken file can break its reader in any way
            raise UserError(f"{checkpoint}: cannot be read; delete it to begin anew") from None
        if theirs != run:
            raise UserError(f"{checkpoint}: was written with --seed {theirs['seed']} --steps "
                            f"{theirs['steps']}, or on another text; delete it to begin anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    save(first)                             # fails now, not after minutes, if it cannot write

    began, bar = time.time(), tqdm(range(first, args.steps), initial=first, total=args.steps,
                                   unit="step")
    for step in bar:
        loss = add_gradients(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, peak)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % (every or EVERY) == 0 and step + 1 < args.steps:
            tqdm.write(f"step {step + 1}  loss {loss:.3f}  " + json.dumps(
                {name: round(share, 3) for name, share in report().items()}))
            save(step + 1)
    keep()
    checkpoint.unlink(missing_ok=True)
    print(f"last loss {loss:.3f}, {time.time() - began:.0f} s")
    for name, share in report().items():
        print(f"{name:24} {share:.4f}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_flags(__doc__, 10000, f"{TOKENS:,} tokens", ROOT / "data" / "base", argv)
    world = World()
    ranks = learn_pieces(world)
    model = Transformer(config())
    init_weights(model, args.seed)
    with tempfile.TemporaryDirectory() as folder:       # an earlier base stays until the end
        save_base(model, ranks, Path(folder))
        tokenizer = load_tokenizer(folder)

    def add_gradients(step: int) -> float:
        sequences, loss = text_of_step(world, tokenizer, args.seed, step), 0.0
        n = sum(len(s.tokens) - s.start for s in sequences)
        for group in groups_by_length(sequences):
            share = target_loss(model, *collate(group)) / n
            share.backward()
            loss += share.item()
        for tokens, is_target in drills(args.seed, step):
            (DRILL_WEIGHT * target_loss(model, tokens, is_target) / is_target.sum()).backward()
        return loss

    recipe = list(ranks), config(), FIRST_MIX, MIX, TOKENS, LENGTH, START_STEPS, DRILL_WEIGHT
    train(model, args, recipe, add_gradients, lambda: report_scores(model, tokenizer, world),
          lambda: save_base(model, ranks, args.out))


if __name__ == "__main__":
    main()
