"""The errors that pyeditfast raises beside ``ValueError`` and ``TypeError``."""

from __future__ import annotations


class PyEditFastError(Exception):
    """Base of every error that belongs to pyeditfast alone."""


class RecordError(PyEditFastError, ValueError):
    """A record of an edit file cannot be read; the message names file, place and field."""


class EditRejectedError(PyEditFastError, ValueError):
    """An edit cannot be carried out and ``strict=True`` was asked for."""


class UnknownModuleError(PyEditFastError, ValueError):
    """An edit module is not in the model; the message suggests the nearest names."""


class UnsupportedWeightError(PyEditFastError, TypeError):
    """A weight cannot be edited in place (quantized, not floating point, not a matrix)."""


class PassTooLargeError(PyEditFastError, MemoryError):
    """A single sequence does not fit in memory, so that no smaller pass can be tried.

    ``index`` is the caller's number of the sequence, None if unknown.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class NumericalError(PyEditFastError, ArithmeticError):
    """A computation left the range in which its result can be trusted."""


class NotPositiveDefiniteError(NumericalError):
    """A matrix has no Cholesky factor, even in float64 and with jitter."""


class NonFiniteError(NumericalError):
    """An input or a result holds NaN or infinity."""


class ShiftOverflowError(NumericalError):
    """Adding a shift could leave the range of the weight's dtype."""
