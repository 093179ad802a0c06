"""A row of a table as one document: plain text, tokens, a chat, or an instruction with its answer."""

from __future__ import annotations

from typing import Any

from ...errors import SurgeryError
from .sources import BrokenRow

INSTRUCTION = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)
"""Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), which data with these columns are made for."""

CONTEXT = ", paired with an input that provides further context"


def render(row: dict[str, Any], where: str, tokenizer: Any, column: str = "text") -> str | list[int]:
    """The text or the tokens of a row, by the first of these that it has: `input_ids`; the column of text; `messages`,
    a list of {role, content}, in the tokenizer's chat template; `instruction` and `output`, and maybe `input`.

    Raises:
        BrokenRow: it has none of them, or not as they should be.
        SurgeryError: the tokenizer has no chat template.
    """
    if "input_ids" in row:
        return _tokens(row["input_ids"], where)
    if column in row:
        return _string(row, column, where)
    if "messages" in row:
        return _chat(row["messages"], where, tokenizer)
    if "instruction" in row and "output" in row:
        return _instruction(row, where)
    keys = ", ".join(f"`{key}`" for key in row) or "no keys at all"
    raise BrokenRow(
        f"{where}: has none of `input_ids`, `{column}`, `messages` and `instruction` with `output`, only {keys}"
    )


def _tokens(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise BrokenRow(f"{where}: `input_ids` must be a list of integers")
    return ids


def _string(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise BrokenRow(f"{where}: `{column}` must be a string, not {type(row[column]).__name__}")
    return row[column]


def _instruction(row: dict[str, Any], where: str) -> str:
    instruction, output = _string(row, "instruction", where), _string(row, "output", where)
    given = _string(row, "input", where) if row.get("input") is not None else ""
    context, given = (CONTEXT, f"### Input:\n{given}\n\n") if given else ("", "")
    return INSTRUCTION.format(context=context, instruction=instruction, input=given, output=output)


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise BrokenRow(f"{where}: `messages` must be a list of {{role, content}}, both of them strings")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise SurgeryError(
            f"{where}: has `messages`, and the tokenizer has no chat template: set its chat_template, or give text"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise BrokenRow(f"{where}: the chat template refuses `messages`: {error}") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
