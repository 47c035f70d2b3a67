"""Exceptions: one family, each also what Python expects of its kind.

Every text names the argument, the rule that it breaks and the numbers. `status` is the name of the status of the C interface that
stands for the same error: `TS_STATUS_OUT_OF_PAGES`.
"""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BusyError",
    "DefectError",
    "Error",
    "OutOfMemoryError",
    "OutOfPagesError",
    "OutOfRangeError",
    "TokenSelectError",
    "UnsupportedError",
]


class TokenSelectError(RuntimeError):
    """Every error of this package; by itself one of order, of a device, or of something closed."""

    status: str

    def __init__(self, text: str, status: str = "TS_STATUS_OTHER") -> None:
        super().__init__(text)
        self.status = status

    def __reduce__(self) -> "tuple[type[TokenSelectError], tuple[str, str]]":
        return type(self), (str(self), self.status)


class ArgumentError(TokenSelectError, ValueError):
    """An argument breaks a rule: shape, strides, place, page table, limit, sequence."""


class ArgumentTypeError(TokenSelectError, TypeError):
    """An argument is of another class, or its elements of another type."""


class OutOfRangeError(ArgumentError, IndexError):
    """An index is not below its limit."""


class OutOfMemoryError(TokenSelectError, MemoryError):
    """Memory cannot be had, on the host or on the device."""


class OutOfPagesError(TokenSelectError):
    """A cache has not enough free pages. Nothing grew."""


class UnsupportedError(TokenSelectError, NotImplementedError):
    """The device cannot do that."""


class BusyError(TokenSelectError):
    """An object is at work in another call, of another thread or of a `prefill` whose `progress` this is."""


class DefectError(TokenSelectError):
    """A defect of this package. The objects that took part cannot be used any more."""


Error = TokenSelectError
