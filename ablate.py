"""A grid of runs and what came out: methods x ranks x learning rates x seeds, and any other flag.

    python ablate.py --methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2
    python ablate.py --methods lora,dual --task mini --lrs 5e-3,1e-2 --seeds 0,1,2 --search-seeds 0
    python ablate.py --methods dual,lora --vary init-std=0.03,0.06 --vary alpha=16,32 --jobs 2
    python ablate.py --methods dual --one-at-a-time --vary clip=no --vary update-warmup=5,60
    python ablate.py --methods lora,dual --list > commands
    parallel -j 4 < commands                        or xargs -d '\\n' -P 4 -I {} sh -c {} < commands
    sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands)"          in a Slurm array
Any flag of train.py that is not varied is passed on to every run. Each run has a folder of its own
under --out. The sweep can be given again at any time, after kill -9 too: what is finished is
skipped, what was stopped goes on. --list prints the commands instead of running them, one a line,
for several processes or machines that share a folder; those of seeds that the search leaves out
come once it is done. What the first run refuses ends the sweep, with status 2; of a later one that
fails the line is told, the others go on, and the status is 1.

A method's learning rate, for each rank and setting, is the best of --lrs on validation, on average
over seeds; the test scores are only reported. Into --out go table.md, results.csv (a line a run),
without --vary score.png, rates.png and loss.png with their numbers, and logs/ with what the runs
printed.
"""
from experiments.sweep import run
from support.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    run(argv, __doc__)


if __name__ == "__main__":
    main()
