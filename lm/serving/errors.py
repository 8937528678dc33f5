"""Errors as OpenAI's protocol has them: a status, and a JSON object that says what was found in which parameter."""

from typing import Any

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        message: What was found, and what to do.
        param: The parameter that it is about.
        status: HTTP's number.
        code: A word for programs.
        retry_after: Seconds after which it may succeed.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What the response's headers add."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def unsupported(name: str, advice: str = "leave it out") -> ApiError:
    """Return the error for what is known of OpenAI's API, and not served."""
    return ApiError(f"{name} is not served here: {advice}", name, code="unsupported_parameter")
