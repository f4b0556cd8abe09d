"""Chats: render with the chat template, find what the assistant says, turn both into token ids and a mask.

Trained on: what stands in `{% generation %}` blocks, or, when the template has none, each assistant turn's content,
found by rendering it once more between private-use characters: its thought, where the template leaves it in, its answer
and its calls. Either way the token that ends the turn belongs to it.

A text that spells a control token (`<|im_end|>` in a user's question) must stay text. Only for such chats, content is
rendered with those spellings replaced by private-use characters; then control tokens are what the template wrote, and
the replaced spellings are put back and encoded as plain text.
"""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
from tokenizers import Encoding, Tokenizer

from tasks.errors import UserError
from tasks.preparation.records import Message

Spans = list[tuple[int, int]]  # of characters
# Of a turn: before its thought, before its answer (or all it says), behind that, in the name of its first call.
Marks = tuple[str, ...]

PRIVATE_FIRST, PRIVATE_LAST = 0xF0000, 0xFFFFD  # plane 15: assigned to nobody
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE: list[Message] = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
# Templates may ask for today's date; a stage's output must not depend on it. (Llama 3's own fallback date.)
FIXED_DATE = datetime(2024, 7, 26)
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
# Ways to mark turns (thought and answer apart, blanks that stay outside of the marks); the first that leaves the text
# as it is counts. A template that trims drops blanks only where no mark keeps them; one that cuts thoughts, their mark.
MARKINGS: list[tuple[bool, str | None]] = [(False, ""), (False, None), (True, "\n"), (True, None)]


class ChatEncoder:
    """A template with its tokenizers: `control` knows special tokens, `plain` takes their spellings as text."""

    def __init__(self, template: str, variables: dict[str, str], control: Tokenizer, plain: Tokenizer) -> None:
        self.template, self.control, self.plain = template, control, plain
        self.variables = {**variables, "strftime_now": FIXED_DATE.strftime}
        self.has_generation = bool(GENERATION.search(template))
        specials = [token.content for token in control.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile("|".join(re.escape(t) for t in sorted(specials, key=len, reverse=True)) or "(?!)")
        self.end_of_turn = self._find_end_of_turn()

    def encode(self, chats: list[list[Message]], wheres: list[str]) -> list[np.ndarray]:
        """Ids of each chat; an id that is not trained on is stored as its complement, `~id`."""
        rendered = [self._render_safe(chat, where) for chat, where in zip(chats, wheres, strict=True)]
        easy = [i for i, (_, _, restore) in enumerate(rendered) if not restore]
        encodings = self.control.encode_batch([rendered[i][0] for i in easy], add_special_tokens=False)
        found = {i: _ids_and_starts(encoding) for i, encoding in zip(easy, encodings, strict=True)}
        out = []
        for i, (text, spans, restore) in enumerate(rendered):
            ids, starts = found[i] if i in found else self._encode_pieces(text, restore)
            out.append(np.where(_inside(starts, spans), ids, ~ids))
        return out

    def render(self, chat: list[Message], where: str) -> tuple[str, Spans]:
        """The text of a chat, and what of it is trained on."""
        text, spans = self._render(chat, where)
        _check_calls(chat, text, where)
        if not self.has_generation:
            spans = self._spans_by_marking(chat, text, where)
        return text, [(start, self._with_end_of_turn(text, start, end)) for start, end in spans]

    def _render(self, chat: list[Message], where: str, **options: Any) -> tuple[str, Spans]:
        # Imported here: it takes 1 s, and only chats need it.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        try:
            texts, spans = render([chat], chat_template=self.template, return_assistant_tokens_mask=self.has_generation,
                                  **options, **self.variables)  # fmt: skip
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the chat: {error}", where=where,
                            todo="correct the record, or set `model.chat_template`") from None  # fmt: skip
        return texts[0], (spans[0] if spans else [])

    def _render_safe(self, chat: list[Message], where: str) -> tuple[str, Spans, dict[str, str]]:
        """Like `render`, with the spellings of control tokens replaced; the last part says by what."""
        spelled = sorted(set(self.special.findall(_all_text(chat))))
        if not spelled:
            return *self.render(chat, where), {}
        private = _unused_private(_all_text(chat), len(spelled))
        replace = dict(zip(spelled, private, strict=True))
        safe = _map_text(chat, lambda text: self.special.sub(lambda match: replace[match.group()], text))
        return *self.render(safe, where), {char: token for token, char in replace.items()}

    def _encode_pieces(self, text: str, restore: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode control tokens and the text between them one by one; starts are positions in `text`."""
        ids: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for start, piece in _split_at(self.special, text):
            if self.special.fullmatch(piece):
                ids.append(np.array([self.control.token_to_id(piece)], dtype=np.int32))
                starts.append(np.array([start]))
                continue
            literal, origin = _restore(piece, restore)
            piece_ids, piece_starts = _ids_and_starts(self.plain.encode(literal, add_special_tokens=False))
            ids.append(piece_ids)
            starts.append(origin[piece_starts] + start)
        return np.concatenate(ids), np.concatenate(starts)

    def _spans_by_marking(self, chat: list[Message], text: str, where: str) -> Spans:
        for apart, blanks in MARKINGS:
            if spans := self._marked_spans(chat, text, where, apart, blanks):
                return spans
        raise UserError("cannot tell what the assistant says: the chat template changes its turns", where=where,
                        allowed="a template with {% generation %} ... {% endgeneration %} around them",
                        todo="set `model.chat_template` to such a file, like configs/chat_template.jinja")  # fmt: skip

    def _marked_spans(self, chat: list[Message], text: str, where: str, apart: bool, blanks: str | None) -> Spans:
        """The spans by one more rendering; empty when the marks changed the text, or came out in another order."""
        private = iter(_unused_private(text + _all_text(chat), 4 * len(chat)))
        # Each turn has its own: a span from one turn's beginning to another's end would hold what the user says.
        marks = [tuple(next(private) for _ in range(4)) for _ in chat]
        marked, _ = self._render([_mark(*pair, apart, blanks) for pair in zip(chat, marks, strict=True)], where)
        unmarked, at = _take_marks(marked, {mark for turn in marks for mark in turn})
        turns = [pair for pair in zip(marks, chat, strict=True) if pair[1]["role"] == "assistant"]
        if unmarked != text or list(at) != [mark for turn, message in turns for mark in _expected(turn, message, at)]:
            return []
        spans = []
        for (thought, open_, close, call), message in turns:
            start, end = at.get(open_, -1), at.get(close, -1)
            if message.get("tool_calls"):  # up to the end of the turn, whatever the template writes around them
                start = start if open_ in at else self._behind_header(text, at[call])
                end = text.find(self.end_of_turn, at[call]) if self._ends_with_calls(message, where) else -1
            if start < 0 or end < 0:
                return []
            spans.append(_with_first_tag(text, at.get(thought, start), end))
        return spans

    def _behind_header(self, text: str, call: int) -> int:
        """Where a turn begins that is nothing but calls; -1 if that cannot be told."""
        question, where = PROBE[:1], "the chat template"
        header = self._render(question, where, add_generation_prompt=True)[0]
        header = header.removeprefix(self._render(question, where)[0])
        start = text.rfind(header, 0, call) + len(header) if header and header in text[:call] else -1
        return start if self.end_of_turn not in text[max(start, 0) : call] else -1

    def _ends_with_calls(self, message: Message, where: str) -> bool:
        """Whether the template ends a turn with calls as any other: else the next end is that of another turn."""
        text, _ = self._render([*PROBE[:1], message], where)
        return self.end_of_turn in text[text.rfind(_calls(message)[0]["name"]) :]

    def _with_end_of_turn(self, text: str, start: int, end: int) -> int:
        """Where the turn ends when the token that ends it is counted in."""
        if self.end_of_turn in text[start:end]:
            return end
        after = end + len(text[end:]) - len(text[end:].lstrip())
        return after + len(self.end_of_turn) if text.startswith(self.end_of_turn, after) else end

    def _find_end_of_turn(self) -> str:
        text, _ = self._render(PROBE, "the chat template")
        found = self.special.search(text, text.rfind("Answer"))
        if not found:
            raise UserError(
                "the chat template ends the assistant's turn with no special token: the model would never stop",
                where="model.chat_template",
                todo="write the tokenizer's EOS after the turn: {{ eos_token }}",
            )
        return found.group()


def _ids_and_starts(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    return np.array(encoding.ids, dtype=np.int32), np.array([start for start, _ in encoding.offsets], dtype=np.int64)


def _inside(starts: np.ndarray, spans: Spans) -> np.ndarray:
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (starts >= start) & (starts < end)
    inside[:1] = False  # nothing comes before a chat's first token, so nothing predicts it
    return inside


def _check_calls(chat: list[Message], text: str, where: str) -> None:
    """What the template does not write is not learned: then the calls would be lost without a word."""
    for name in (str(call["name"]) for message in chat for call in _calls(message)):
        if name not in text:
            raise UserError(f"the chat template leaves out the assistant's call of '{name}'", where=where,
                            allowed="a template that writes `tool_calls`, or chats without them",
                            todo="set `model.chat_template` to one that does")  # fmt: skip


def _calls(message: Message) -> list[dict[str, Any]]:
    """What holds the name of each call of a turn: OpenAI's form, or the bare one."""
    found = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [call for call in found if isinstance(call, dict) and isinstance(call.get("name"), str)]


def _expected(marks: Marks, message: Message, at: dict[str, int]) -> list[str]:
    """The marks of a turn in their order. Of one with calls some templates leave out what else it says."""
    thought, open_, close, call = marks
    calls_only = bool(message.get("tool_calls")) and not {open_, close} & at.keys()
    return [*([thought] if thought in at else []), *([] if calls_only else [open_, close]),
            *([call] if message.get("tool_calls") else [])]  # fmt: skip


def _mark(message: Message, marks: Marks, apart: bool, blanks: str | None) -> Message:
    if message["role"] != "assistant":
        return message
    thought, open_, close, call = marks
    marked = copy.deepcopy(message) if message.get("tool_calls") else dict(message)
    for named in _calls(marked)[:1]:
        named["name"] = named["name"][:1] + call + named["name"][1:]
    parts = message["content"].split(THOUGHT_ENDS) if apart else [message["content"]]
    if len(parts) > 1:
        head, begins, inner = parts[0].rpartition(THOUGHT_BEGINS)
        parts[0] = head + begins + _before_words(inner, thought)
    elif isinstance(message.get("reasoning_content"), str):
        marked["reasoning_content"] = _before_words(message["reasoning_content"], thought)
    core = parts[-1].strip(blanks)
    if parts[-1].strip() or not message.get("tool_calls"):  # templates ask whether there are words beside the calls
        head, tail = parts[-1].split(core, 1) if core else (parts[-1], "")
        parts[-1] = f"{head}{open_}{core}{close}{tail}"
    return {**marked, "content": THOUGHT_ENDS.join(parts)}


def _before_words(text: str, mark: str) -> str:
    """A mark behind leading blanks; none in a text without words: the template's empty thought is not the model's."""
    return re.sub(r"(?=\S)", mark, text, count=1)


def _take_marks(marked: str, marks: set[str]) -> tuple[str, dict[str, int]]:
    """The text without marks, and where each stood; one that stands there again stays in the text."""
    unmarked, at = "", {}
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece in marks and piece not in at:
            at[piece] = len(unmarked)
        else:
            unmarked += piece
    return unmarked, at


def _with_first_tag(text: str, start: int, end: int) -> tuple[int, int]:
    """The span with the tag that opens its thought, which the template may have written."""
    before = text[:start].rstrip()
    if THOUGHT_ENDS in text[start:end] and before.endswith(THOUGHT_BEGINS):
        return len(before) - len(THOUGHT_BEGINS), end
    return start, end


def _all_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\0".join(map(_all_text, value.values()))
    return "\0".join(map(_all_text, value)) if isinstance(value, list) else ""


def _map_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_text(inner, change) for key, inner in value.items()}
    return [_map_text(inner, change) for inner in value] if isinstance(value, list) else value


def _unused_private(text: str, number: int) -> list[str]:
    used = set(text)
    free = (chr(code) for code in range(PRIVATE_FIRST, PRIVATE_LAST) if chr(code) not in used)
    return [next(free) for _ in range(number)]


def _split_at(pattern: re.Pattern[str], text: str) -> list[tuple[int, str]]:
    pieces, at = [], 0
    for match in pattern.finditer(text):
        pieces += [(at, text[at : match.start()])] if match.start() > at else []
        pieces.append((match.start(), match.group()))
        at = match.end()
    return pieces + ([(at, text[at:])] if at < len(text) else [])


def _restore(piece: str, restore: dict[str, str]) -> tuple[str, np.ndarray]:
    """The piece with spellings put back, and for each of its characters the position in `piece` it comes from."""
    literal = [restore.get(char, char) for char in piece]
    return "".join(literal), np.repeat(np.arange(len(piece)), [len(text) for text in literal])
