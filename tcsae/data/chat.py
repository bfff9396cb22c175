"""Conversations: rows of turns, each a role and what it says, as text and as marked tokens.

A row is one document. Its text is made by the tokenizer's chat template, or is plain, `role: text`
with a blank line between turns. Its tokens carry marks until they are packed: a template writes bos
and eos inside of one conversation, so the ids alone do not say where a segment begins.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tcsae.base.errors import UserError, first_line

CHAT = 1 << 29
"""Mark of a token of a conversation: it starts no segment for being bos or eos."""
START = 1 << 30
"""Mark of a token that starts a segment."""
IDS = CHAT - 1
"""What is left of a marked token: its id."""
Form = Literal["template", "plain"]

_NAMES = ("role", "content"), ("from", "value")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Of the form with from and value; others are as they stand."""


class Turn(NamedTuple):
    role: str
    content: str


Turns = tuple[Turn, ...]


def turns_of(value: Any, where: str) -> Turns | None:
    """The turns of a field's value; None: it is no list of objects, so no conversation.

    Raises UserError, with `where`, for a turn without a role or without text.
    """
    if not isinstance(value, list) or not value or not any(isinstance(v, dict) for v in value):
        return None
    return tuple(_turn(part, f"{where}: turn {n}") for n, part in enumerate(value, 1))


def _turn(part: Any, where: str) -> Turn:
    names = next((n for n in _NAMES if isinstance(part, dict) and n[0] in part), None)
    if names is None:
        raise UserError(
            f"{where} has no role: a turn is an object with role and content, or from and value"
        )
    role, content = part[names[0]], part.get(names[1])
    if not isinstance(role, str) or not role.strip():
        raise UserError(f"{where} has no role: {names[0]} must be a word such as user")
    if isinstance(content, list):
        content = "".join(_text_part(p, where) for p in content)
    if not isinstance(content, str):
        raise UserError(
            f"{where} has no text: {names[1]} must be text (or a list of parts with text); leave "
            "out rows with calls of tools alone"
        )
    if names == _NAMES[1]:
        role = _ROLES.get(role, role)
    return Turn(*(_legal(text) for text in (role, content)))


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(f"{where} has a part that is no text (an image?): leave the row out")


def _legal(text: str) -> str:
    """Half of a surrogate pair is legal in JSON and refused by tokenizers."""
    return text.encode("utf-8", "replace").decode("utf-8")


def plain_text(turns: Turns) -> str:
    """`role: text` of each, with a blank line between."""
    return "".join(_plain_parts(turns))


def _plain_parts(turns: Turns) -> list[str]:
    parts = [f"{turn.role}: {turn.content}\n\n" for turn in turns]
    return [*parts[:-1], parts[-1].removesuffix("\n\n")]


def part_of(turns: Turns, start: int, n_chars: int) -> Turns:
    """The turns that begin in those characters of the plain text; where none does, that much of
    the one that stands there."""
    kept, place, last, at_last = [], 0, turns[0], 0
    for turn, text in zip(turns, _plain_parts(turns), strict=True):
        if start <= place < start + n_chars:
            kept.append(turn)
        if place <= start:
            last, at_last = turn, place
        place += len(text)
    if kept:
        return tuple(kept)
    begin = max(start - at_last - len(last.role) - 2, 0)
    return (Turn(last.role, last.content[begin : begin + n_chars]),)


class ChatTokens:
    """From turns to marked tokens.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        bos: the id that stands before every document.
        form: template, by the tokenizer's chat template where it has one; plain, never by it.
        by_turn: whether a segment is a turn; else it is the conversation.
    """

    def __init__(
        self, tokenizer: Any, bos: int, form: Form = "template", by_turn: bool = False
    ) -> None:
        self._tokenizer, self._bos, self.by_turn = tokenizer, bos, by_turn
        self.templated = form == "template" and bool(getattr(tokenizer, "chat_template", None))

    def __call__(self, conversations: Sequence[tuple[str, Turns]]) -> Iterator[np.ndarray]:
        """Marked tokens, int32, of each (name, turns). A bos that the template leads with is left
        out: every document has one before it.

        Raises UserError, with the name, for turns that the template does not take.
        """
        texts, places = [], []
        for name, turns in conversations:
            text, starts = self._templated(name, turns) if self.templated else _plain(turns)
            texts.append(text)
            places.append(starts)
        if not texts:
            return
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            # What the template writes is special, what people write (plain) never is.
            split_special_tokens=not self.templated,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, offsets, starts in zip(
            found["input_ids"], found["offset_mapping"], places, strict=True
        ):
            yield self._marked(ids, [end for _, end in offsets], starts)

    def _marked(self, ids: list[int], ends: list[int], starts: list[int]) -> np.ndarray:
        """`starts`: characters at which turns begin, of all but the first."""
        marked = np.array(ids, dtype=np.int32) | np.int32(CHAT)
        if self.by_turn:
            # A token across the edge belongs to the turn that it ends in.
            first = [bisect_right(ends, start) for start in starts]
            marked[[n for n in first if n < len(ids)]] |= np.int32(START)
        return marked[1:] if self.templated and ids[:1] == [self._bos] else marked

    def _templated(self, name: str, turns: Turns) -> tuple[str, list[int]]:
        for n, turn in enumerate(turns, 1):
            if spelt := next((s for s in self._specials if s in turn.content), None):
                raise UserError(
                    f"{name}: turn {n} spells {spelt}, which means something to this tokenizer: "
                    "take it out, or set dataset.chat=plain"
                )
        text = self._rendered(name, turns)
        if not self.by_turn:
            return text, []
        starts = []
        for n in range(1, len(turns)):
            before = self._rendered(name, turns[:n])
            if not text.startswith(before):
                raise UserError(
                    f"{name}: the chat template writes turn {n} otherwise where turn {n + 1} "
                    "follows, so that turns have no place: set dataset.segments=document, or "
                    "dataset.chat=plain"
                )
            starts.append(len(before))
        return text, starts

    def _rendered(self, name: str, turns: Turns) -> str:
        messages = [turn._asdict() for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        # Templates are programs: they raise what their authors wrote, or what Jinja finds.
        except Exception as error:
            raise UserError(
                f"{name}: the tokenizer's chat template does not take it "
                f"({first_line(error)}): mend the row, or set dataset.chat=plain"
            ) from None
        return str(text)

    @functools.cached_property
    def _specials(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]


def _plain(turns: Turns) -> tuple[str, list[int]]:
    parts = _plain_parts(turns)
    ends = np.cumsum([len(part) for part in parts])
    return "".join(parts), ends[:-1].tolist()
