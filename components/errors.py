"""The error of bad input, which names the key that it is about. It imports nothing of the project."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user wrote cannot be used.

    A component raises it in its constructor, in `build` and in what that returns. Whoever built the component reports
    the message at the line where the key was written.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key
        """Dotted path below the component's own table, such as `stages`; empty for the table as a whole."""
        self.message = message
        """The value, the limit and the remedy."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message

    @staticmethod
    def below(key: str, error: Exception) -> InputError:
        """Return `error` as one about `key`, or about the key below it that `error` names itself."""
        kind = MissingFileError if isinstance(error, FileNotFoundError) else InputError
        inner = getattr(error, "key", "")
        return kind(f"{key}.{inner}" if inner else key, message_of(error))


class MissingFileError(InputError, FileNotFoundError):
    """A file or directory that a key names is not on this machine."""


def message_of(error: Exception) -> str:
    """Return the text of an error without the key that it is about."""
    return error.message if isinstance(error, InputError) else str(error)
