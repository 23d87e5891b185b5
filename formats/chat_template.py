"""Writes a chat as the text that its model was made for, by the tokenizer's own template.

A template is a small program in the language of jinja2, which comes with torch. It runs in jinja2's
sandbox, as in transformers (utils/chat_template_utils.py), since it comes from a stranger's file.
"""
import json
from datetime import datetime
from pathlib import Path

from formats.json_files import expected_layout, read_bytes, read_json_if_there
from formats.special_tokens import ROLES
from support.errors import UserError, within

# The day that a template which asks for today's date gets. It is the one that LLaMA-3.1's template
# names itself. With the real date a run's prompts would change overnight.
TODAY = datetime(2024, 7, 26)
SECONDS = 5             # in which a template must write a chat


def read_chat_template(folder: Path) -> str | None:
    """Reads chat_template.jinja, or chat_template in tokenizer_config.json; None without both.

    Several templates may stand there by name: then the one named `default` counts.
    """
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        with expected_layout(file):
            return read_bytes(file).decode()
    with expected_layout(settings):
        template = read_json_if_there(settings).get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}["default"]
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is a {type(template).__name__}")
        return template or None


class ChatTemplate:
    """Holds a compiled template and the texts of bos, eos and pad, which it may use.

    Raises UserError, which begins with the folder, if it does not compile.
    """

    def __init__(self, template: str, tokenizer):
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Reads {% generation %} ... {% endgeneration %}, marks that change nothing here."""
            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
                return nodes.Scope(body).set_lineno(line)

        def refuse(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation])
        environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
            value, ensure_ascii=ensure_ascii, **options)
        environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
        self.folder = tokenizer.path.parent
        self.texts = {f"{role}_token": tokenizer.decode([i]) for role in ROLES
                      if (i := getattr(tokenizer, role)) in tokenizer.special}
        self.template = self.tried(lambda: environment.from_string(template))

    def tried(self, call):
        """Returns call(). Raises UserError if the template fails in any way, or takes too long."""
        try:
            return within(SECONDS, call)
        except Exception as error:          # a template can do anything that a program can
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.folder}: its chat template fails: {reason}") from None

    def write(self, messages: list[dict], tools=None, ask: bool = False) -> str:
        """Writes the messages; with `ask` also what stands before the assistant's next turn."""
        return self.tried(lambda: self.template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=ask,
            **self.texts))
