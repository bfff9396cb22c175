"""What is shown of names and tokens of others."""

from __future__ import annotations

import logging

import pytest
from helpers import tiny_tokenizer

from tcsae import cli
from tcsae.base.log import FORMAT
from tcsae.base.printable import printable
from tcsae.data.token_text import TokenTexts, pieces, token_text


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2Kb\r\x07\u202ec.txt"
    assert printable(f"{name}\n\tend") == "a\\x1b[2Kb\\r\\x07\\u202ec.txt\n\tend"
    cli.say(name)
    assert capsys.readouterr().err == "tcsae: a\\x1b[2Kb\\r\\x07\\u202ec.txt\n"
    cli.show(b"a\xff.txt".decode("utf-8", "surrogateescape"))
    assert capsys.readouterr().out == "a\\udcff.txt\n"
    record = logging.LogRecord("tcsae", logging.INFO, "", 0, "%s", (name,), None)
    assert FORMAT.format(record).endswith("a\\x1b[2Kb\\r\\x07\\u202ec.txt")


def test_tokens_that_are_parts_of_characters_are_told_apart() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("é日 stone")
    texts = [token_text(tokenizer, i) for i in ids]
    assert texts[:5] == ["\\xc3", "\\xa9", "\\xe6", "\\x97", "\\xa5"]
    assert "".join(texts[5:]) == " stone"
    every = [token_text(tokenizer, i) for i in range(len(tokenizer))]
    assert "" not in every and len(set(every)) == len(every)


def test_tokens_in_a_row_show_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)

    def read(ids: list[int]) -> list[tuple[int, int, str]]:
        return [tuple(piece) for piece in texts.pieces(ids)]

    ids = tokenizer.encode("é日 a")
    assert read(ids) == [(0, 2, "é"), (2, 5, "日"), (5, 6, " a")]
    # What is cut off, or fits to nothing, is shown as it is; what follows is not lost.
    assert read(ids[1:]) == [(0, 1, "\\xa9"), *((a - 1, b - 1, t) for a, b, t in read(ids)[1:])]
    assert [t for _, _, t in read(ids[:4])] == ["é", "\\xe6", "\\x97"]
    assert [t for _, _, t in read([ids[2], *ids[:2]])] == ["\\xe6", "é"]
    assert [t for _, _, t in read([ids[2], ids[5]])] == ["\\xe6", " a"]
    files = texts.files(ids)
    assert files["parts"] == {str(i): texts.part(i).hex() for i in ids[:5]}  # type: ignore[union-attr]
    assert pieces(["a"], [None]) == [(0, 1, "a")] and pieces([], []) == []
    # One token that ends a character and begins the next.
    assert pieces(["x", "y", "z"], [b"\xc3", b"\xa9\xc3", b"\xa9"]) == [(0, 3, "éé")]


def test_a_leading_space_is_kept_where_decoders_take_it_away() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "\u2581a"]
    own = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [("\u2581", "a")]))
    own.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>")
    shown = {t: token_text(tokenizer, i) for i, t in enumerate(vocabulary)}
    assert (shown["\u2581"], shown["a"], shown["\u2581a"]) == (" ", "a", " a")
    assert shown["<0xE6>"] == "\\xe6" and shown["<0x41>"] == "A"


@pytest.mark.parametrize("name", ["<script>x</script>", "a`b``c", "[x](http://y)", "a|b\n# c"])
def test_names_on_a_model_card_are_code(name: str) -> None:
    import re

    from tcsae.jobs.model_card import quoted

    text = quoted(name)
    fence = re.match("`+", text)
    assert fence is not None and text.endswith(fence[0]) and "\n" not in text and "|" not in text
    # No run of backticks inside is as long as the fence: nothing ends it early.
    inside = text[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inside)
