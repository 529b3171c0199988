"""The loop that every text of this package comes from: logits, a draw, the next logits."""

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor


def new_tokens(
    read: Callable[[Sequence[int]], Tensor],
    token_ids: Sequence[int],
    draw: Callable[[Tensor], int],
    *,
    at_most: int,
    ends: Collection[int],
) -> Iterator[int]:
    """Tokens that follow ``token_ids``, without the one of ``ends`` that may end them.

    Args:
        read: takes tokens that follow those of its calls before; answers with the logits [vocabulary] of the next one.
        draw: chooses a token from its logits.
        at_most: so many tokens; the last one is not read.
        ends: tokens that end a text.
    """
    for _ in range(at_most):
        token = draw(read(token_ids))
        if token in ends:
            return
        yield token
        token_ids = (token,)
