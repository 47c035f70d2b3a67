"""Contexts whose limits follow what is asked of them."""

from __future__ import annotations

from collections.abc import Callable

from tokenselect import Context

__all__ = ["Growing"]


class Growing:
    """A context that is made when it is first needed, and again, larger, when it must be: nothing that was captured may use it."""

    def __init__(self, make: Callable[..., Context]) -> None:
        """`make` is called with as many limits as `get`."""
        self._make = make
        self._made: tuple[Context, tuple[int, ...]] | None = None

    def get(self, *need: int) -> Context:
        """One whose limits are at least these."""
        had = self._made[1] if self._made else (0,) * len(need)
        if self._made is None or any(got < want for got, want in zip(had, need, strict=True)):
            # Up to twice what is needed where it grows, so that sequences which get longer come here seldom.
            room = tuple(got if got >= want else _round_up(want) for got, want in zip(had, need, strict=True))
            self._made = None  # gives its workspace back first
            self._made = (self._make(*room), room)
        return self._made[0]


def _round_up(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else 1
