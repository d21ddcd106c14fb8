"""The errors of mlbox, few, told apart by what the caller does about them.

They know no HTTP; `web.problems` is the one place that turns them into a status. A message says what was
asked, what was found and what to do.
"""

from dataclasses import dataclass


class MlboxError(Exception):
    """Base of every error that mlbox raises on purpose; its text is meant for the person who asked."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One bad field of a request: its name as the user wrote it, and what is wrong with it."""

    field: str
    message: str


class Invalid(MlboxError):
    """The request is malformed: a bad field, name, archive or number. Mend it and send it again."""

    def __init__(self, message: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors


class Impossible(Invalid):
    """Well-formed, but can never be done here (nine GPUs on a box with eight)."""


class TooLarge(MlboxError):
    """More bytes than the limit for this request."""


class Unauthenticated(MlboxError):
    """Nobody known is asking: no credential, or one that is wrong, expired or revoked."""


class Denied(MlboxError):
    """Somebody known is asking for what they may not do."""


class NotFound(MlboxError):
    """No such thing, or none that the asker may know of."""


class Conflict(MlboxError):
    """The thing is not in a state in which that can be done."""


class TooMany(MlboxError):
    """The asker does this too often. Wait `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(MlboxError):
    """mlbox cannot do it at the moment (disk full, stopping, server restarting). Try again later."""

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
