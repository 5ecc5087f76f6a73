"""The one error that clients see, in OpenAI's shape."""

import re
from typing import Any

from llama.engine.request import RequestError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

# A conversation's errors begin with the place that they are about, as in `messages[3].content is missing`.
_PLACE = re.compile(r"(?:messages|tools)(?:\[\d+\]|\.\w+)*(?= )")


class ApiError(Exception):
    """An answer that is an error: HTTP status, a sentence that says what to change, and where.

    type: a class of errors, by default the status's. param: the field at fault, as in `messages[0].role`.
    code: the kind of fault, for programs. retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, *, type: str | None = None, param: str | None = None,
                 code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object that a client gets."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def refusal(error: ValueError, param: str | None = None) -> ApiError:
    """A refusal from below as a 400: RequestError, ChatError, TokenizerError. param: if it names no field."""
    if isinstance(error, RequestError):
        param = error.field
    elif place := _PLACE.match(str(error)):
        param = place[0]
    return ApiError(400, str(error), param=param, code="invalid_value")
