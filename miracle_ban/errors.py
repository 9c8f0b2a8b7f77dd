"""The errors that users can meet. Each message says what, where, the value and the remedy."""

from __future__ import annotations


class MiracleError(Exception):
    """Root of every error that this package raises on purpose."""


class UnsupportedModelError(MiracleError, TypeError):
    """The model cannot be converted: it holds nothing that can be coded, or non-finite weights."""


class BudgetError(MiracleError, ValueError):
    """The budget cannot be read, or is too small for what has to be stored."""


class CodingError(MiracleError, RuntimeError):
    """A block could not be coded, or an interrupted encode does not fit its checkpoint."""


class FileFormatError(MiracleError, ValueError):
    """The bytes are not a readable `.mban` file."""


class NotAnArchiveError(FileFormatError):
    """The file does not begin as a `.mban` file begins."""


class VersionError(FileFormatError):
    """The file was written in a format version that this release does not know."""


class CorruptError(FileFormatError):
    """The file is damaged: its checksum, a length or a code table is wrong."""


class MismatchError(MiracleError, ValueError):
    """The file and the model (or the coder and its input) do not belong together."""


class MiracleWarning(UserWarning):
    """Something that the user should know but that does not stop the work."""
