"""Records: from a parsed object to a document's text or a chat's messages, with errors that name file and line.

A chat is a list of `{"role", "content"}`: an optional `system` turn, then `user` and `assistant` in turn (`tool`
turns may stand between two assistant turns), and it ends with the assistant. Prompt/completion, Alpaca and ShareGPT
become that form.
"""

from __future__ import annotations

from typing import Any

import orjson

from tasks.config import nearest
from tasks.errors import UserError
from tasks.preparation.readers import Located, wrong_encoding

Message = dict[str, Any]

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "tool": "tool"}  # fmt: skip
# What may follow a role; "" is the start of a chat.
NEXT_ROLES = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
              "tool": ("assistant", "tool")}  # fmt: skip


def parse_lines(payload: bytes, path: str, first_line: int) -> list[Located]:
    """JSON lines with their numbers; blank lines are skipped."""
    lines = payload.split(b"\n")
    return [(first_line + i, _parse_line(line, path, first_line + i)) for i, line in enumerate(lines) if line.strip()]


def _parse_line(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            raise wrong_encoding(path, number, wrong) from None
        raise UserError(
            f"malformed JSON: {error}", where=f"{path}:{number}", allowed="one JSON object a line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"the line holds {_kind(record)}", where=f"{path}:{number}", allowed="one JSON object a line")
    return record


def document_text(record: dict[str, Any], fields: dict[str, str], where: str) -> str:
    """The text of a document."""
    return _text(record, fields["text"], where)


def chat_messages(record: dict[str, Any], kind: str, fields: dict[str, str], where: str) -> list[Message]:
    """The messages of a chat, in one form, checked."""
    if kind == "prompt":
        messages = _prompt_completion(record, fields, where)
    elif kind == "instruction":
        messages = _alpaca(record, fields, where)
    elif kind == "conversations":
        messages = _sharegpt(_field(record, fields["conversations"], where), fields["conversations"], where)
    else:
        messages = _messages(_field(record, fields["messages"], where), fields["messages"], where)
    _check_roles(messages, where)
    return messages


def _field(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise UserError(f"the field '{field}' is missing{nearest(field, record)}", where=where,
                        allowed=f"the fields of this record: {', '.join(map(str, record))}",
                        todo="correct the source's field mapping, or the record")  # fmt: skip
    return record[field]


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = _field(record, field, where)
    if not isinstance(value, str):
        raise UserError(f"the field '{field}' holds {_kind(value)}", where=where, allowed="a text",
                        todo="correct the record, or remove it" if value is None else "")  # fmt: skip
    return value


def _prompt_completion(record: dict[str, Any], fields: dict[str, str], where: str) -> list[Message]:
    messages: list[Message] = []
    for name, role in ((fields["prompt"], "user"), (fields["completion"], "assistant")):
        value = _field(record, name, where)
        if isinstance(value, list):
            messages += _messages(value, name, where)
        else:
            messages.append({"role": role, "content": _text(record, name, where)})
    return messages


def _alpaca(record: dict[str, Any], fields: dict[str, str], where: str) -> list[Message]:
    prompt = _text(record, fields["instruction"], where)
    others = [name for name in record if name not in fields.values()]
    if "input" in fields and fields["input"] not in record and not nearest(fields["input"], others):
        fields = {role: name for role, name in fields.items() if role != "input"}  # many sets leave out an empty one
    if "input" in fields and _field(record, fields["input"], where) not in (None, ""):
        prompt += "\n\n" + _text(record, fields["input"], where)
    answer = _text(record, fields["output"], where)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _sharegpt(turns: Any, field: str, where: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(turns, field, where)):
        at = f"{where}, {field}[{number}]"
        role = _text(turn, "from", at)
        if role not in SHAREGPT_ROLES:
            raise UserError(f"'from' is {role!r}", where=at, allowed=", ".join(SHAREGPT_ROLES))
        messages.append({"role": SHAREGPT_ROLES[role], "content": _text(turn, "value", at)})
    return messages


def _messages(turns: Any, field: str, where: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(turns, field, where)):
        at = f"{where}, {field}[{number}]"
        if turn.get("content") is None and turn.get("tool_calls"):
            turn = {**turn, "content": ""}  # a turn may be nothing but calls
        parts = turn.get("content")
        if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
            turn = {**turn, "content": _joined(parts, at)}
        message = {"role": _text(turn, "role", at), "content": _text(turn, "content", at)}
        extra = {key: value for key, value in turn.items() if key not in message and value is not None}
        messages.append(message | extra)  # tool calls, names: the template decides
    return messages


def _joined(parts: list[dict[str, Any]], where: str) -> str:
    """Content in parts, as OpenAI's format has it: texts are joined; a model of text takes nothing else."""
    if others := [part.get("type") for part in parts if part.get("type") != "text"]:
        raise UserError(f"'content' holds a part of type {others[0]!r}", where=where, allowed="parts of type 'text'",
                        todo="leave out records with images, sound and files")  # fmt: skip
    return "".join(_text(part, "text", where) for part in parts)


def _turns(turns: Any, field: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"the field '{field}' holds {_kind(turns)}", where=where, allowed="a list of turns (objects)")
    return turns


def _check_roles(messages: list[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"the chat has no assistant turn; its roles are {', '.join(roles) or 'none'}", where=where,
                        todo="add the answer, or remove the record")  # fmt: skip
    before = ""
    for number, role in enumerate(roles):
        if role not in NEXT_ROLES or not role:
            raise UserError(
                f"turn {number} has the role {role!r}", where=where, allowed="system, user, assistant, tool"
            )
        if role not in NEXT_ROLES[before]:
            raise UserError(f"roles out of order: turn {number}, {role!r} follows {before or 'nothing'!r}", where=where,
                            allowed=" or ".join(NEXT_ROLES[before]))  # fmt: skip
        before = role
    if before != "assistant":
        raise UserError(f"roles out of order: the chat ends with {before!r}", where=where, allowed="assistant",
                        todo="add the answer, or remove the last turn")  # fmt: skip


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    name = names.get(type(value), "a number")
    return f"{name} ({str(value)[:40]})" if name not in ("null", "an object", "a list") else name
