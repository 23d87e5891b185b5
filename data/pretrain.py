"""Trains data/base, the small LLaMA-style model that ships, on text about the built-in world.

    python data/pretrain.py                                the shipped base, from nothing
    python data/pretrain.py --steps 200 --out /tmp/base    a quick look at the whole path
A killed run goes on from its last 500 steps: a step's text depends on the seed and the step alone.

The shipped base: 2,500 steps (20 M tokens), 41 minutes on one core of a two-core machine that was
busy with other work, last loss 0.645. Greedy recall of its 3,880 facts: statements 0.999 to 1.000
by wording; questions 1.000 on taught people, places, animals and things, and 0.995 on untaught
people, about whom it was never asked.
"""
import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)                 # a script's own folder comes first; ours is one level up

from common import UserError, atomic_write, exit_on_user_error  # noqa: E402
from convert import save_pretrained  # noqa: E402
from data.task import Example, encode, recall  # noqa: E402
from data.world import World, cloze, documents, question  # noqa: E402
from model import Config, Transformer  # noqa: E402
from tokenizer import load_tokenizer, save_ranks, train_bpe  # noqa: E402

VOCAB = 1536                            # byte-level BPE: 1,534 pieces, then bos and eos
ROWS, LENGTH = 32, 256                  # tokens a step: 8,192
PEAK_LR, WARMUP = 3e-3, 200


def config() -> Config:
    return Config(vocab_size=VOCAB, d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32,
                  d_ff=352, max_positions=512, bos=VOCAB - 2, eos=[VOCAB - 1])


def rows(world: World, tokenizer, seed: int, step: int) -> torch.Tensor:
    """One step's text, (ROWS, LENGTH + 1): bos, document, eos, over and over, cut at the end."""
    rng, batch = random.Random(f"pretrain-{seed}-{step}"), []
    stream = documents(world, rng, 10 ** 9)
    while len(batch) < ROWS:
        row = []
        while len(row) <= LENGTH:
            row += [tokenizer.bos, *tokenizer.encode(next(stream)), tokenizer.eos]
        batch.append(row[:LENGTH + 1])
    return torch.tensor(batch)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def report(model: Transformer, tokenizer, world: World) -> dict[str, float]:
    """Share of facts that the model knows, by wording and by who was asked about in pretraining."""
    examples = []
    for fact in world.facts:
        who = "untaught" if fact.subject in world.untaught else "taught"
        examples += [Example(*cloze(fact, i), group=f"statement {i}") for i in range(5)]
        examples += [Example(*question(fact, i), group=f"question, {who}") for i in range(3)]
    return recall(model, tokenizer, examples, batch_size=256, max_length=LENGTH).values


def save_base(model: Transformer, ranks: dict[bytes, int], folder: Path) -> None:
    save_pretrained(model, folder)
    save_ranks(ranks, folder / "base.tiktoken")


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of 8,192 tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the text")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "base", help="folder to write")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1")
    world = World()
    sample = "\n".join(documents(world, random.Random("tokenizer"), 20000))
    ranks = train_bpe(sample, VOCAB - 2)
    model = Transformer(config()).init_weights(torch.Generator().manual_seed(args.seed))
    with tempfile.TemporaryDirectory() as folder:       # an earlier base stays until the last step
        save_base(model, ranks, Path(folder))
        tokenizer = load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    checkpoint, first = args.out / "pretrain.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if (state["seed"], state["steps"]) != (args.seed, args.steps):
            raise UserError(f"{checkpoint}: of --seed {state['seed']} --steps {state['steps']}; "
                            f"give these to go on with it, or delete it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    start, bar = time.time(), tqdm(range(first, args.steps), initial=first, total=args.steps,
                                   unit="step")
    for step in bar:
        text = rows(world, tokenizer, args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(text[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 500 == 0 and step + 1 < args.steps:
            known = report(model, tokenizer, world)
            tqdm.write(f"step {step + 1}  loss {loss.item():.3f}  " + json.dumps(
                {name: round(share, 3) for name, share in known.items()}))
            with atomic_write(checkpoint) as path:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": step + 1, "seed": args.seed, "steps": args.steps}, path)
    save_base(model, ranks, args.out)
    checkpoint.unlink(missing_ok=True)
    print(f"last loss {loss.item():.3f}, {time.time() - start:.0f} s")
    for name, share in report(model, tokenizer, world).items():
        print(f"{name:20} {share:.4f}")


if __name__ == "__main__":
    main()
