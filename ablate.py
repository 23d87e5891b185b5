"""Runs a grid of methods, ranks, learning rates, seeds and other flags, and compares them.

    python ablate.py --methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2
    python ablate.py --methods lora,dual --task mini --lrs 5e-3,1e-2 --seeds 0,1,2 --search-seeds 0
    python ablate.py --methods dual,lora --vary init-std=0.03,0.06 --vary alpha=16,32 --jobs 2
    python ablate.py --methods dual --one-at-a-time --vary clip=no --vary update-warmup=5,60
    python ablate.py --methods lora,dual --list > commands
    parallel -j 4 < commands                      # or xargs -d '\\n' -P 4 -I {} sh -c {} < commands
    sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands)"        # in a Slurm array
Other flags go to train.py. Each run has a folder of its own under --out. The same command can be
given again at any time, even after kill -9: it skips finished runs and goes on with stopped ones.
Two sweeps may share a folder; a run that the other sweep is making fails here.
--list prints the commands, one on each line, instead of running them. Several processes or machines
can then share a folder. Seeds that are not in --search-seeds are listed once the search is done.
If the first run is refused, the sweep ends with status 2. If a later run fails, its last line is
printed, the others go on, and the status is 1.

The learning rate of a method, for each rank and setting, is the one of --lrs with the best mean
score over the seeds on validation. Test scores choose nothing. The folder --out gets table.md,
results.csv with a line for each run, and logs/ with the runs' output. Without --vary it also gets
score.png, rates.png and loss.png with their numbers.
"""
from experiments.sweep import run_sweep
from support.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    run_sweep(argv, __doc__)


if __name__ == "__main__":
    main()
