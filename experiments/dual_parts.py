"""Trains Dual LoRA without its ReLU, without its Sign, or without both: an ablation, for study.

    python -m experiments.dual_parts train --method dual-no-relu            # as train.py
    python -m experiments.dual_parts ablate --methods dual,dual-no-relu,dual-no-sign,dual-neither
    dual-no-relu   W' = W0 + warmup * s (B A) (.) Sign(D C)
    dual-no-sign   W' = W0 + warmup * s ReLU(B A) (.) (D C)
    dual-neither   W' = W0 + warmup * s (B A) (.) (D C)
All else is Dual LoRA's: the warm-up, the share of W0 that the untrained update has after it, the
learning rate of C and D. The clip of the gradient through Sign is an option of `dual` itself,
--no-clip.
"""
import math
import runpy
import sys

import torch

from dual_lora import DualLoRALinear, Sign
from experiments.sweep import run_sweep
from methods import METHODS, Method
from support.errors import UserError, exit_on_user_error
from support.run import ROOT


class DualPartsLinear(DualLoRALinear):
    """W' = W0 + warmup * scale * f(B A) (.) g(D C): f is ReLU or nothing, g is Sign or nothing."""
    options = {name: option for name, option in DualLoRALinear.options.items() if name != "clip"}
    clip = False                        # there is no Sign whose gradient could be clipped
    has_relu, has_sign = False, False

    def delta_weight(self, rows=slice(None)):
        magnitude = (self.warmup * self.scale * self.B[rows]) @ self.A      # (out, in)
        direction = self.D[rows] @ self.C
        if self.has_relu:
            magnitude = torch.relu(magnitude)
        if self.has_sign:
            direction = Sign.apply(direction, self.limit)
        return magnitude * direction

    def start_size(self) -> tuple[float, float]:
        """Returns what Dual LoRA's does, for another rms(dW) = c std^n at full warm-up.

        c has sqrt(r1 / 2) with ReLU, else sqrt(r1). Without Sign it has sqrt(r2) too, and n is 4.
        """
        std, share = super().start_size()
        more = math.sqrt(1 if self.has_relu else 2)         # c of this update / c of Dual LoRA's
        more, n = (more, 2) if self.has_sign else (more * math.sqrt(self.r2), 4)
        if self.init_std is not None:
            return std, share * more * std ** (n - 2)
        return (std ** 2 / more) ** (1 / n), share


class NoReLULinear(DualPartsLinear):
    options = DualLoRALinear.options
    has_sign = True


class NoSignLinear(DualPartsLinear):
    has_relu = True


PARTS = {"dual-no-relu": NoReLULinear, "dual-no-sign": NoSignLinear,
         "dual-neither": DualPartsLinear}


def add_parts() -> None:
    """Adds the three to METHODS, with Dual LoRA's learning rates."""
    METHODS.update({name: Method(layer, METHODS["dual"].lr, METHODS["dual"].large_lr)
                    for name, layer in PARTS.items()})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    add_parts()
    program = ["-m", "experiments.dual_parts", "train"]
    if command == "ablate":
        run_sweep(rest, __doc__, [sys.executable, *program])
    elif command in ("-h", "--help"):
        print(__doc__)
    elif command == "train":
        sys.argv = [" ".join(program), *rest]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        raise UserError(f"{command or 'nothing'}: give train or ablate, and its flags")


if __name__ == "__main__":
    main()
