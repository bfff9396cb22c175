"""A token on its own as text that tells it from others."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_text(tokenizer: Any, token: int) -> str:
    r"""What `token` writes: part of a character as its bytes (\xe6), a leading space kept.

    Decoded alone, parts of characters are all the same replacement sign, and decoders of the Llama
    kind take away a leading space, of the token that is a space everything.

    Args:
        tokenizer: of transformers.
    """
    text: str = tokenizer.decode([token])
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if byte := _BYTE.fullmatch(piece):
        return _shown(bytes([int(byte[1], 16)]))
    if piece.startswith("\u2581") and not text.startswith(" "):
        return " " + text
    if "\ufffd" in text or not text:
        written = _bytes_of(piece)
        return _shown(written) if written is not None else text or piece
    return text


def _shown(written: bytes) -> str:
    return written.decode("utf-8", errors="backslashreplace")


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece of a byte-level vocabulary; None: it is of another kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if not all(character in byte_of for character in piece):
        return None
    return bytes(byte_of[character] for character in piece)
