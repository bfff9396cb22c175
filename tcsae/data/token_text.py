"""Tokens as text: one alone tells itself from others, a row of them reads as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """Neighbouring tokens that make whole characters together; as a rule it is one token."""

    start: int
    stop: int
    """Places in the row of tokens: start is in it, stop is not."""
    text: str


class TokenTexts:
    """Token ids as text, each decoded once.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token: int) -> str:
        r"""What the token writes: part of a character as its bytes (\xe6), a leading space kept."""
        return self._of(token)[0]

    def part(self, token: int) -> bytes | None:
        """Its bytes, where they are not whole characters; None: they are."""
        return self._of(token)[1]

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """A row of tokens as text to be read."""
        return pieces([self(i) for i in ids], [self.part(i) for i in ids])

    def files(self, ids: Iterable[int]) -> dict[str, dict[str, str]]:
        """Texts and, of parts of characters, bytes as hex digits, by token id: JSON values."""
        known = {str(i): self._of(i) for i in ids}
        return {
            "tokens": {i: text for i, (text, _) in known.items()},
            "parts": {i: part.hex() for i, (_, part) in known.items() if part is not None},
        }

    def _of(self, token: int) -> tuple[str, bytes | None]:
        if token not in self._known:
            self._known[token] = _written(self._tokenizer, token)
        return self._known[token]


def token_text(tokenizer: Any, token: int) -> str:
    r"""What `token` writes on its own: see `TokenTexts`."""
    return _written(tokenizer, token)[0]


def pieces(texts: Sequence[str], parts: Sequence[bytes | None]) -> list[Piece]:
    r"""The same row of tokens with parts of characters put together; what fits to nothing as \xe6.

    Args:
        texts: of each token on its own.
        parts: bytes of the tokens that are not whole characters; None for the others.
    """
    found: list[Piece] = []
    pending = b""
    start = 0

    def give_up(stop: int) -> None:
        found.extend(Piece(i, i + 1, texts[i]) for i in range(start, stop))

    for i, (text, part) in enumerate(zip(texts, parts, strict=True)):
        if part is None:
            give_up(i)
            found.append(Piece(i, i + 1, text))
            pending, start = b"", i + 1
            continue
        if pending and _character_of(pending + part) == "":
            give_up(i)
            pending, start = b"", i
        pending += part
        whole = _character_of(pending)
        if whole == "":
            give_up(i + 1)
        elif whole is not None:
            found.append(Piece(start, i + 1, whole))
        if whole is not None:
            pending, start = b"", i + 1
    give_up(len(texts))
    return found


def _character_of(written: bytes) -> str | None:
    """Bytes as text; None: what has begun well and goes on; "": what no text has."""
    try:
        return written.decode("utf-8")
    except UnicodeDecodeError as error:
        return None if error.reason == "unexpected end of data" else ""


def _written(tokenizer: Any, token: int) -> tuple[str, bytes | None]:
    """Text of a token alone, and its bytes where they are not whole characters.

    Decoded alone, parts of characters are all the same replacement sign, and decoders of the Llama
    kind take away a leading space, of the token that is a space everything.
    """
    text: str = tokenizer.decode([token])
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if byte := _BYTE.fullmatch(piece):
        return _shown(bytes([int(byte[1], 16)]))
    if piece.startswith("\u2581") and not text.startswith(" "):
        return " " + text, None
    if "\ufffd" in text or not text:
        written = _bytes_of(piece)
        return _shown(written) if written is not None else (text or piece, None)
    return text, None


def _shown(written: bytes) -> tuple[str, bytes | None]:
    try:
        return written.decode("utf-8"), None
    except UnicodeDecodeError:
        return written.decode("utf-8", errors="backslashreplace"), written


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece of a byte-level vocabulary; None: it is of another kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if not all(character in byte_of for character in piece):
        return None
    return bytes(byte_of[character] for character in piece)
