"""Writes a run's adapters for other programs, and merges adapters of PEFT into their model.

    python convert.py --run runs/NAME --to DIR        # a run's model, merged, for transformers
    python convert.py --run runs/NAME --peft DIR      # its adapters, for PEFT or diffusers
    python convert.py --from-peft DIR --model PATH --to DIR2      # PEFT's adapters, merged
To train on from PEFT's adapters: python train.py --from-peft DIR --model PATH.

In code, use load_pretrained, save_pretrained, export_peft and import_peft from formats/.
"""
from pathlib import Path

from formats.checkpoint import copy_texts, load_pretrained, save_pretrained, texts_of
from formats.peft import export_peft, import_peft
from methods import merge
from support.errors import UserError, exit_on_user_error
from support.parser import Parser
from support.run import check_base, load_adapters, read_flags, weights_dtype


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", help="folder that train.py wrote")
    parser.add_argument("--from-peft", metavar="DIR", help="instead of --run: adapters that PEFT "
                                                           "wrote, in a folder or on the hub")
    parser.add_argument("--model", help="with --from-peft: the pretrained model")
    parser.add_argument("--to", metavar="DIR", help="write the merged model here")
    parser.add_argument("--peft", metavar="DIR", help="write the adapters here, for PEFT")
    parser.add_argument("--rank", type=int, help="with --peft: rank of the LoRA that is to stand "
                                                 "for a Dual LoRA")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.from_peft is None):
        raise UserError("give one of --run FOLDER and --from-peft DIR")
    if (args.model is None) != (args.from_peft is None):
        raise UserError("--from-peft needs --model PATH" if args.run is None else
                        "--model: a run has its own; use it with --from-peft")
    if (args.to is None) == (args.peft is None):
        raise UserError("give one of --to DIR and --peft DIR")
    if args.rank is not None and args.peft is None:
        raise UserError("--rank: use it with --peft")
    target = Path(args.peft if args.to is None else args.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already, and is not an empty folder")
    run = args if args.run is None else read_flags(args.run)
    model, _ = load_pretrained(run.model)
    if args.run is not None:
        check_base(args.run, model, weights_dtype(run.dtype, run.method))
        load_adapters(args.run, model)
    else:
        import_peft(model, args.from_peft)
    if args.to is not None:
        texts = texts_of(run.model)
        save_pretrained(merge(model), target)
        copy_texts(texts, target, model.config)
    else:
        for path, lost in export_peft(model, target, args.rank, run.model).items():
            print(f"{path}: {100 * lost:.1f} % of the update lost at rank {args.rank}")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
