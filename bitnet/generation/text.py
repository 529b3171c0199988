"""From tokens to text while the tokens still come: whole characters only, and never part of a stop text."""

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet
LONGEST_CHARACTER = 4  # bytes, so tokens at most
LONGEST_WINDOW, SHORT_WINDOW = 32, 16  # tokens


class Decoder(Protocol):
    """What turning ids into text needs of a tokenizer; every transformers tokenizer has it."""

    def decode(self, token_ids: Any, **options: Any) -> Any: ...


class Detokenizer:
    """Text of one token after the other; all pieces together are the text of all tokens.

    A token can be a part of a character, and whether it begins with a space can depend on the token before it. So a
    token is decoded together with those before it since the last piece of text, and one piece more: a few tokens, at
    any length of the text. What may still become another character is held back: the replacement characters at the
    end, at most three, as a character has at most four bytes. Special tokens have no text.

    Args:
        tokenizer: its ``decode`` is used.
        context: ids that come before; their text is not given again.
    """

    def __init__(self, tokenizer: Decoder, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._pending = len(self._window)  # where the tokens begin whose text has not been given in full
        self._given = self._decoded()  # the text of the window that needs no more giving

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often none, sometimes several characters."""
        self._window.append(token)
        text = self._decoded()
        certain = len(text) - self._uncertain(text)
        piece = text[len(self._given) : certain]
        if piece:
            self._given = text[:certain]
        if piece and certain == len(text):
            self._shorten(self._pending, 0)
            self._pending = len(self._window)
        elif len(self._window) > LONGEST_WINDOW:
            self._shorten(len(self._window) - SHORT_WINDOW, len(text) - len(self._given))
            self._pending = 0
        return piece

    def end(self) -> str:
        """What was held back; it stays what it is now."""
        text = self._decoded()
        piece, self._given = text[len(self._given) :], text
        return piece

    def _uncertain(self, text: str) -> int:
        """Characters at the end of ``text`` that the next token may change."""
        trailing = len(text) - len(text.rstrip(REPLACEMENT))
        open_run = not text.startswith(self._given) and len(self._window) - self._pending < LONGEST_CHARACTER
        if trailing and open_run:  # byte fallback decodes a run of bytes as a whole: an open character spoils all of it
            return len(text)
        return min(trailing, LONGEST_CHARACTER - 1)

    def _shorten(self, begin: int, held: int) -> None:
        """Let the window begin at ``begin``, with the last ``held`` characters of its text still to be given."""
        self._window = self._window[begin:]
        text = self._decoded()
        self._given = text[: max(0, len(text) - held)]

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopFilter:
    """Passes text on up to that of some stop texts which is complete first, however it is cut into pieces.

    Attributes:
        stopped: whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.stopped = tuple(stops), "", False

    def push(self, piece: str) -> str:
        """The text that cannot be part of a stop text."""
        if not self._stops or self.stopped:
            return "" if self.stopped else piece
        text, self._held = self._held + piece, ""
        places = [(text.find(stop), stop) for stop in self._stops]
        ends = [(place + len(stop), place) for place, stop in places if place >= 0]
        if ends:  # the one that is complete first, of these the longest: the same, however the text is cut
            self.stopped = True
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        held = next((n for n in range(longest, 0, -1) if self._begins_a_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
