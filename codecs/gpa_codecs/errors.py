"""Errors that name the thing, the value, what was expected and what to do.

Every error that a user can cause derives from :class:`GpaError`; the command line prints its message without a
traceback and exits with status 2. Anything else that escapes is a defect of this project.
"""


class GpaError(Exception):
    """Base of every error that a user's input, files or environment can cause."""


class AudioError(GpaError):
    """Audio that cannot be read, used or written."""


class CheckpointError(GpaError):
    """A checkpoint folder or file that is missing, damaged or does not belong with the others."""


class TokenError(GpaError):
    """Token ids or codes outside their family, or text that cannot be turned into ids."""


class RequestError(GpaError):
    """A generation request that an engine cannot serve as asked."""


class DeclinedRequest(RequestError):
    """A request that an engine does not do, though it is well: asked of the engine again, it is declined again."""


class CapacityError(DeclinedRequest):
    """A request that is larger than a limit of the engine (context, cache)."""


class BackendError(GpaError):
    """A backend that is unknown, not installed, or asked for something that it cannot do."""
