"""Reads a user's examples: rows of three forms, as JSON lines or as one JSON array.

    {"prompt": "Colour a:", "target": " red"}                          as it stands
    {"instruction": "Add", "input": "1 2", "output": "3"}              alpaca's; `input` is optional
    {"messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello"}]}          a chat

An alpaca row's instruction and input stand in data/prompt.txt, and its output is the target.
A chat's last turn, the assistant's, is the target. All before it is the prompt. The tokenizer's own
chat template writes both. Without one each turn is a paragraph: "User: Hi", "Assistant: Hello".
"""
import sys
from typing import Iterator

from data.reading import numbered_lines, parse_json, read_template, read_text
from data.task import Example
from formats.chat_template import ChatTemplate, read_chat_template
from support.errors import UserError

ALPACA = ("instruction", "input", "output")
BY_TEMPLATE = "written by the tokenizer's chat template"
BY_PARAGRAPHS = ("the tokenizer has no chat template: each turn is a paragraph, User: ..., "
                 "Assistant: ...")


def read_rows(path: str) -> Iterator[tuple[str, object]]:
    """Yields the place of each row and the row. A file that begins with [ is one array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, path), 1):
            yield f"{path}, row {number}", row
    else:
        for number, line in numbered_lines(path):
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def read_examples(path: str, tokenizer) -> tuple[list[Example], dict[str, str]]:
    """Reads the examples of a file. Notes say how its chats are written, if it has any.

    An alpaca row without an output is left out, with a message: alpaca's own file has some.
    Raises UserError, which names the row, if it has none of the forms, or its target is empty.
    """
    examples, notes, empty = [], {}, 0
    frame, template = read_template(None), None
    for where, row in read_rows(path):
        keys = row.keys() if isinstance(row, dict) else set()
        if {"prompt", "target"} <= keys:
            prompt, target = row["prompt"], row["target"]
        elif {"instruction", "output"} <= keys:
            instruction, more, output = ("" if row.get(key) is None else row[key]
                                         for key in ALPACA)
            if not all(isinstance(text, str) for text in (instruction, more, output)):
                raise UserError(f"{where}: {', '.join(ALPACA)} must be text")
            if not output.strip():
                empty += 1
                continue
            asked = "\n\n".join(filter(None, (instruction.strip(), more.strip())))
            prompt, target = frame.replace("{instruction}", asked), f" {output.strip()}"
        elif "messages" in keys:
            if "chat" not in notes:
                source = read_chat_template(tokenizer.path.parent)
                template = None if source is None else ChatTemplate(source, tokenizer)
                notes["chat"] = BY_PARAGRAPHS if source is None else BY_TEMPLATE
            prompt, target = last_turn(where, row, template, tokenizer)
        else:
            raise UserError(f'{where}: not a JSON object with "prompt" and "target", '
                            '"instruction" and "output", or "messages"')
        if not isinstance(prompt, str) or not isinstance(target, str) or not target:
            raise UserError(f"{where}: prompt and target must be text, target not empty")
        examples.append(Example(prompt, target, source=where))
    if empty:
        print(f"left out: {path}: {empty} rows with an empty output", file=sys.stderr)
    return examples, notes


def last_turn(where: str, row: dict, template: ChatTemplate | None,
              tokenizer) -> tuple[str, str]:
    """Writes a chat up to its last turn, and this turn without an eos at its end.

    Raises UserError, which begins with `where`, if a message is no text with a role, or the last
    is not the assistant's.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str) for m in messages):
        raise UserError(f'{where}: messages must be a list of {{"role": TEXT, "content": TEXT}}')
    *before, last = messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise UserError(f"{where}: the last message must be the assistant's, and not empty")
    if template is None:
        turns = [f"{m['role'].capitalize()}: {m['content'].strip()}" for m in before]
        return "\n\n".join([*turns, "Assistant:"]), f" {last['content'].strip()}"
    try:
        prompt = template.write(before, row.get("tools"), ask=True)
        whole = template.write(messages, row.get("tools"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    # A template may end the prompt with words, such as <think>, that the written turn lacks.
    turn = whole[len(prompt):] if whole.startswith(prompt) else last["content"]
    eos = "" if tokenizer.eos is None else tokenizer.decode([tokenizer.eos])
    if eos and turn.rstrip().endswith(eos):     # encode() ends every target with it
        turn = turn.rstrip().removesuffix(eos)
    return prompt, turn
