"""Lists published recipes for GLUE; `--recipe NAME` fills in what the user leaves out.

lora     RoBERTa-base (Hu et al. 2021, arXiv 2106.09685, table 9): rank 8 on q and v, 6 % warm-up
         (train.py's own). alpha 16 and weight decay .1 are the scripts', the table has alpha 8.
         The scripts use eight GPUs, with the table's batch on each. MRPC, RTE and STS-B went on
         from MNLI's adapters, for which there is no flag here.
adalora  DeBERTaV3-base (Zhang et al. 2023, 2303.10512, table 8): all six linear layers, batch 32,
         beta .85 (AdaLoRA's default here). The rows are the scripts'. The table differs in lr: QNLI
         1.2e-3, QQP 5e-4, CoLA 5e-4; and in gamma: CoLA .5, STS-B .1. The paper's smaller budget
         starts at rank 3 and ends at 2. The scripts go from 2 to 1, for CoLA from 3 to 1. MRPC's
         warm-up is 10 % of its 3,450 steps. LoRA-Dash's code for GLUE shares this recipe.
The learning rate falls in a line, as train.py has it. AdaLoRA's t_init and t_final are steps, of
runs as long as these.
"""
from support.errors import UserError, nearest

LORA = {        # set: lr, epochs, batch
    "mnli": (5e-4, 30, 16),
    "sst2": (5e-4, 60, 16),
    "mrpc": (4e-4, 30, 16),
    "cola": (4e-4, 80, 32),
    "qnli": (4e-4, 25, 32),
    "qqp":  (5e-4, 25, 16),
    "rte":  (5e-4, 80, 32),
    "stsb": (4e-4, 40, 16),
}
# set: tokens, lr, epochs, warm-up, head dropout, decay, alpha, gamma, t_init, delta_t, t_final
ADALORA = {
    "mnli": (256, 5e-4, 7, 1000, 0.15, 0.0, 16, 0.1, 8000, 100, 50000),
    "rte":  (320, 1.2e-3, 50, 200, 0.2, 0.01, 32, 0.3, 600, 1, 1800),
    "qnli": (512, 5e-4, 5, 500, 0.1, 0.01, 32, 0.1, 2000, 100, 8000),
    "mrpc": (320, 1e-3, 30, 345, 0.0, 0.01, 32, 0.1, 600, 1, 1800),
    "qqp":  (320, 8e-4, 5, 2000, 0.15, 0.01, 16, 0.1, 8000, 100, 25000),
    "sst2": (128, 8e-4, 24, 1000, 0.0, 0.01, 16, 0.1, 6000, 100, 22000),
    "cola": (64, 8e-4, 25, 100, 0.1, 0.0, 32, 0.1, 800, 10, 3500),
    "stsb": (128, 2.2e-3, 25, 100, 0.2, 0.1, 32, 0.3, 800, 10, 2000),
}
# The flags of the columns, then those that are the same for every set.
RECIPES = {
    "lora": (LORA, ("lr", "epochs", "batch_size"),
             {"rank": 8, "alpha": 16.0, "targets": "q,v", "weight_decay": 0.1, "max_length": 512}),
    "adalora": (ADALORA, ("max_length", "lr", "epochs", "warmup", "head_dropout", "weight_decay",
                          "alpha", "gamma", "t_init", "delta_t", "t_final"),
                {"rank": 2, "targets": "q,k,v,o,up,down", "batch_size": 32}),
}


def recipe(name: str, task: str) -> dict:
    """Returns a recipe's flags for a task: name -> value.

    Raises UserError if the recipe is unknown, or has no line for the task.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: unknown{nearest(name, RECIPES)}")
    rows, columns, same = RECIPES[name]
    family, _, of_set = task.partition("/")
    if family != "glue" or of_set not in rows:
        raise UserError(f"--recipe {name}: has no line for task {task}, only for "
                        + ", ".join(f"glue/{known}" for known in rows))
    return dict(zip(columns, rows[of_set])) | same
