"""The tasks by name. A loader takes (tokenizer, max_length, data) and returns a data.task.Task."""
from common import UserError, nearest
from data import facts, text
from data.task import Task

TASKS = {
    "facts": facts.load,
    "text": text.load_text,
    "jsonl": text.load_jsonl,
}


def load_task(name: str, tokenizer, max_length: int, data: str | None = None) -> Task:
    """UserError: an unknown name, a file that is missing or malformed."""
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown{nearest(name, TASKS)}")
    return TASKS[name](tokenizer, max_length, data)
