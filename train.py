"""Fine-tunes a pretrained model with one method of the LoRA family, and scores it.

    python train.py --method dual                          about a minute on a laptop CPU
    python train.py --method lora --rank 2 --lr 1e-2 --seed 1
    python train.py --method dual --model PATH_OR_HUB_REPO --task jsonl --data FILE --epochs 3
    python train.py --method lora --model PATH --task text --data FILE --steps 200
    python train.py --resume --out runs/facts-dual-r8-s0   goes on with a run that was stopped
    torchrun --nproc-per-node 2 train.py --method dual     the same run in two processes
Everything goes to runs/<task>-<method>-r<rank>-s<seed>/, described in support/run.py.
"""
import math
import os
import shlex
import sys
import time
from argparse import Namespace
from functools import lru_cache

import torch
from torch import nn
from tqdm import tqdm

from data import load_task, options_in
from data.task import (Example, collate, data_fingerprint, encode_all, sample, score, score_targets,
                       target_loss)
from formats.checkpoint import open_model
from methods import METHODS, adapters, contract, is_listed, param_groups, save, state
from support.errors import UserError, exit_on_user_error, out_of_memory
from support.flags import adapt, check, parse, resolve, resolve_task, ships, verify
from support.machine import peak_memory_mb, versions
from support.processes import everyones, meeting, parallel, rank, start, summed, world
from support.run import (BEFORE, NEWEST, Run, check_same, fingerprint, read_config, resumed,
                         stop_requests, visible, weights_dtype)


def fit(model, sequences, args: Namespace, run: Run, validate) -> None:
    """The loop: batch, loss, backward, clip, step, on_step, zero_grad, log."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, args.lr, args.weight_decay,
                                               args.lr_ratio or 1.0))
    peaks = [group["lr"] for group in optimizer.param_groups]
    trainable = [p for p in model.parameters() if p.requires_grad]
    first = run.restore(model, optimizer) if args.resume else 0
    loss_of = TargetLoss(model, args.dtype)
    loss_of = parallel(torch.compile(loss_of) if args.compile else loss_of,
                       method.waits_for_gradient)
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step",
               disable=rank() > 0)
    with stop_requests() as asked_to_stop:
        for step in bar:
            factor = lr_factor(step, args.steps, args.warmup)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            batch = [sequences[i] for i in batch_at(step, len(sequences), args.batch_size,
                                                    args.seed)]
            targets = sum(len(s.tokens) - s.start for s in batch)
            loss = 0.0
            for micro, last in own_slices(batch, args.grad_accum):      # one, unless --grad-accum
                with meeting(loss_of, last):
                    part = loss_of(*collate(micro, args.device)) / targets
                    part.backward()
                loss += part.item()
            extra = method.extra_loss(layers)
            if torch.is_tensor(extra):
                extra.backward()
                extra = extra.detach()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
            loss, stopping = summed([loss, asked_to_stop()], args.device)
            stop_unless_finite({"loss": loss, "extra loss": float(extra), "gradient norm": norm},
                               f"step {step}", step, run, bar)
            optimizer.step()
            method.on_step(layers, step, args.steps)
            optimizer.zero_grad()

            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            line = {"step": step, "loss": loss, "lr": args.lr * factor, "grad_norm": norm}
            if torch.is_tensor(extra):
                line["extra_loss"] = extra.item()
            done = step + 1
            validates = done % args.eval_every == 0 and done < args.steps
            snapshots = args.snapshot_every and done % args.snapshot_every == 0
            saves = done % args.save_every == 0 or done == args.steps or stopping
            if validates or snapshots or saves:
                stop_unless_finite(largest_values(model), f"step {step}", done, run, bar)
            if validates:
                line["valid"] = validate()
                stop_unless_finite(line["valid"], f"step {step}", done, run, bar)
            run.log(line)
            if snapshots:
                run.snapshot(model, done)
            if saves:
                run.checkpoint(model, optimizer, done)
            if stopping:
                bar.close()
                raise KeyboardInterrupt


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a line up to 1, then a line down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


@lru_cache(maxsize=2)
def epoch_order(epoch: int, n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * epoch)).tolist()


def batch_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """The indices of a step's examples: epochs of n, each shuffled anew, laid end to end. They
    depend on nothing but these four numbers, so a resumed run needs no reader's position."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(place // n, n, seed)[place % n] for place in places]


class TargetLoss(nn.Module):
    """target_loss() in a --dtype, as a module: what can be compiled and run in processes."""

    def __init__(self, model, dtype: str):
        super().__init__()
        self.model, self.bf16 = model, dtype == "bf16"

    def forward(self, tokens, is_target):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return target_loss(self.model, tokens, is_target)


def largest_values(model) -> dict[str, float]:
    """The largest absolute value of each tensor that trains; NaN where it holds one."""
    return {name: tensor.abs().max().item() for name, tensor in state(model).items()
            if tensor.is_floating_point()}


def stop_unless_finite(numbers: dict[str, float], when: str, done: int, run: Run,
                       bar=None) -> None:
    """Ends the run with status 1 if a number is not finite. They come from the weights after `done`
    steps, so a checkpoint of these is not one to go on from."""
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if not bad:
        return
    if bar is not None:
        bar.close()
    if rank() == 0:
        good = run.folder / (BEFORE if run.newest == done else NEWEST)
        said = ", ".join(f"{name} {value}" for name, value in list(bad.items())[:3])
        print(f"error: {when}: {said}; " + "a lower --lr may help; " * (done > 0)
              + (f"the last good state is {good}" if run.own and good.exists() else
                 "no good state was saved"),
              file=sys.stderr)
    sys.exit(1)


def slices(batch: list, n: int) -> list[list]:
    """The batch as n contiguous slices of (nearly) equal length."""
    cuts = [i * len(batch) // n for i in range(n + 1)]
    return [batch[a:b] for a, b in zip(cuts, cuts[1:])]


def own_slices(batch: list, n: int) -> list[tuple[list, bool]]:
    """Of the batch as n slices for each process, those of this one; and whether it is the last."""
    own = slices(batch, n * world())[n * rank():n * (rank() + 1)]
    return [(micro, i == n - 1) for i, micro in enumerate(own)]


def shown(path: str) -> str:
    """A local path as one would type it here; a hub id as it is."""
    return os.path.relpath(path) if os.path.exists(path) else path


def print_header(args: Namespace, model, task, plan: str, cut: dict) -> dict[str, int]:
    """Says what will run -> the numbers of parameters, trainable and total."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    counts = {"trainable": trainable, "total": total}
    if rank() > 0:
        return counts
    print(f"{args.method} on {args.task}, from {shown(args.model)}, into {args.out}")
    print(f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    if adapters(model):
        own, method = model.injected, METHODS[args.method]
        print(f"{len(adapters(model))} layers adapted: {args.targets or ','.join(own['targets'])}; "
              f"rank {own['rank']}, alpha {own['alpha']:g}, dropout {own['dropout']:g}"
              + "".join(f", {name} {getattr(args, name)}" for name in method.options
                        if getattr(args, name) is not None)
              + (f", lr_ratio {args.lr_ratio:g}" if method.layer.lr_ratio_parameters else ""))
    if plan:
        print(plan)
    print(f"{len(task.train)} train, {len(task.valid)} valid, {len(task.test)} test examples; "
          f"loss on {args.loss_on}")
    if any(cut.values()):
        print(f"{cut['train']} train and {cut['held out']} other examples lose the start of their "
              f"prompt to --max-length {args.max_length}")
    for name in ("trained_on", "missing"):
        if name in task.notes:
            print(f"{name}: {task.notes[name]}")
    large = not ships(args.model) and args.lr == METHODS[args.method].large_lr
    whose = f" ({METHODS[args.method].large_lr_from} for large models)" if large else ""
    print(f"{args.steps} steps of {args.batch_size}, learning rate {args.lr:g}{whose}, "
          f"warm-up {args.warmup}, seed {args.seed}, {args.dtype}, {args.device}"
          + (f", {world()} processes" if world() > 1 else ""))
    return counts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    if args.out is not None and (not args.out or args.out.startswith("-")):
        raise UserError(f"--out {args.out}: must not be empty or begin with -")
    if args.resume and (args.out is None or args.overwrite):
        raise UserError("--resume needs --out FOLDER, the run to go on with, and no --overwrite")
    asked = args.method is not None or args.from_peft is not None
    if args.resume and (not asked or visible(args.out)):
        args = resumed(args)
        verify(args)
    else:
        check(args)
        args.resume = False
        resolve(args)
        args.command = shlex.join(["python", script(argv), *(sys.argv[1:] if argv is None else
                                                             argv)])
    start(args.device)
    everyones(None)             # all have seen that --out is free, before the first makes it
    run = Run()
    try:
        train(args, run)
    except KeyboardInterrupt:
        if rank() == 0:
            launcher = "python" if world() == 1 else f"torchrun --nproc-per-node {world()}"
            print("stopped; " + (f"{launcher} {script(argv)} --resume --out "
                                 f"{shlex.quote(args.out)} goes on" if run.begun else
                                 "the run had not begun"), file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        raise explained(error)
    finally:
        run.release()


def script(argv: list[str] | None) -> str:
    """What was started: train.py, or a file of one's own that adds a method to METHODS."""
    return "train.py" if argv is not None else os.path.relpath(sys.argv[0])


def explained(error: RuntimeError) -> Exception:
    """What the user can do about it, where torch's error tells."""
    from torch._dynamo.exc import TorchDynamoException  # which takes a second to import
    what = " ".join(str(error).split())[:300]
    if isinstance(error, TorchDynamoException):
        return UserError(f"--compile: {what}")
    if out_of_memory(error):
        return UserError(f"out of memory; a smaller --batch-size, --grad-accum, "
                         f"--grad-checkpointing or --max-length may help: {what}")
    if world() > 1 and (isinstance(error, torch.distributed.DistError) or "Connection" in what):
        return UserError(f"another process has ended: {what}")
    return error


def train(args: Namespace, run: Run) -> None:
    began = time.time()
    dtype = weights_dtype(args.dtype, args.method)
    model, tokenizer, args.max_length = open_model(args.model, args.device, args.max_length, dtype)
    began_with = {"base": fingerprint(model.state_dict(), dtype), "processes": world()}
    torch.manual_seed(args.seed)
    adapt(model, args)                          # first what may be refused, then what takes minutes
    began_with["adapters"] = [model.injected, fingerprint(state(model), torch.float32)]
    if rank() > 0:                              # the adapters are the same, their dropout is not
        torch.manual_seed(args.seed + rank() * 2 ** 32)
    model.checkpointing = args.grad_checkpointing
    kind, layers = contract(model)
    task = load_task(args.task, tokenizer, args.max_length, **options_in(args))
    resolve_task(args, task)
    plan = kind.start(layers, args.steps)
    sequences, unseen = (encode_all(split, tokenizer, model, args.max_length, loss_on=args.loss_on)
                         for split in (task.train, sample(task.valid, args.max_eval)))
    held_out = {split: [task.sequences(e, tokenizer, model) for e in getattr(task, split)]
                for split in ("valid", "test")}
    cut = {"train": sum(s.cut for s in sequences),
           "held out": sum(any(s.cut for s in of_example) for of_split in held_out.values()
                           for of_example in of_split)}
    for split, tokens in {"train": sequences, **held_out}.items():
        began_with[f"{split}_data"] = data_fingerprint(getattr(task, split), tokens,
                                                        task.notes)

    run.claim(args)
    if args.resume:
        check_same(args.out, **began_with)
    else:
        run.begin({"args": vars(args), "versions": versions(), **began_with}, args.overwrite)
    counts = print_header(args, model, task, plan, cut)

    def scores(split: str):
        return score(model, tokenizer, task, args.max_eval, split, args.eval_batch_size)

    def validate() -> dict[str, float]:
        """The task's metrics, and the loss a target token."""
        found = score_targets(model, unseen, args.eval_batch_size)
        loss = sum(s.loss for s in found) / sum(s.tokens for s in found)
        return {"loss": loss} | scores("valid").values

    before = read_config(args.out).get("before") if args.resume else None
    if before is None and not args.skip_before:
        before = scores("test").values
        stop_unless_finite(before, "before training", 0, run)
        run.note(before=before)
    fit(model, sequences, args, run, validate)
    after, valid = scores("test"), validate()
    for found in (after.values, valid):
        stop_unless_finite(found, "after training", args.steps, run)
    if rank() > 0:
        return
    save(model, run.folder / "adapter.safetensors")
    run.finish({
        "method": args.method, "task": args.task, **counts,
        "before": before, "after": after.values, "counts": after.counts,
        "valid": valid, "seconds": round(time.time() - began, 1),
        "peak_memory_mb": peak_memory_mb(args.device), "loss_on": args.loss_on, "seed": args.seed,
        "cut": cut, "notes": task.notes, "base": began_with["base"], "versions": versions(),
        "command": args.command})
    print(f"{'':20}{'before':>12}{'after':>12}")
    for name, value in after.values.items():
        print(f"{name:20} " + (f"{before[name]:11.4f}" if before else f"{'-':>11}")
              + f" {value:11.4f}")
    example = next((e for e in task.test if isinstance(e, Example) and "\n" not in e.prompt), None)
    print(f"{time.time() - began:.0f} s; loss on {args.loss_on}; all of it in {run.folder}; next:")
    if not is_listed(args.method):
        print(f"  (once {args.method} stands in methods.py, where eval.py and convert.py look for "
              "it)")
    print(f"  python eval.py --run {shlex.quote(args.out)}"
          + (f" --prompt {shlex.quote(example.prompt)}" if example else ""))


if __name__ == "__main__":
    main()
