"""Reading a request's JSON: each value is checked for its type and range where it is taken; what is left is refused."""

import json
import math
from collections.abc import Collection
from typing import Any

from lm.serving.errors import ApiError, unsupported

UNSERVED: dict[str, Collection[Any]] = {
    **dict.fromkeys(("suffix", "prediction", "audio", "reasoning_effort", "verbosity", "web_search_options"), ()),
    **dict.fromkeys(("metadata", "functions", "tools"), ({}, [])),
    **dict.fromkeys(("tool_choice", "function_call"), ("none",)),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "moderation"), ()),
    "parallel_tool_calls": (True, False),  # of no calls at all
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Parameters of OpenAI's that are not served, and the values that ask for nothing; null always does."""


def loads(body: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: It is none, or has what JSON lacks: NaN, a name twice, lone surrogates, too deep a nesting.
    """

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:60]!r} stands there twice")
        return found

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() and abs(value) < 2**53 else value  # 16.0 is a whole number in JSON

    try:
        values = json.loads(body.decode(), parse_constant=constant, parse_float=number, object_pairs_hook=named)
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates are no text
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 at byte {error.start}: send JSON in UTF-8") from error
    except UnicodeEncodeError as error:
        raise ApiError("the body has half of a surrogate pair, which is no character: send both or none") from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply: no parameter needs that") from error
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ApiError(f"the body is {kind(values)}: send a JSON object")
    return values


def kind(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """Return a value for a message, short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "…"


class Values:
    """A JSON object whose values are taken one by one; null is as good as absent.

    Args:
        values: The object.
        path: What messages put in front of names.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.left, self.path = {name: value for name, value in values.items() if value is not None}, path

    def take(self, name: str, wanted: type | tuple[type, ...], what: str) -> Any:
        """Return a value, None where it is absent.

        Raises:
            ApiError: It is of another type than wanted, which messages call `what`.
        """
        value = self.left.pop(name, None)
        if value is None:
            return None
        right = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
        if not right:
            raise ApiError(f"{self.path}{name} is {kind(value)}: it must be {what}", f"{self.path}{name}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; false where it is absent."""
        return bool(self.take(name, bool, "true or false"))

    def text(self, name: str) -> str | None:
        """Return a string."""
        value: str | None = self.take(name, str, "a string")
        return value

    def number(self, name: str, low: float, high: float, *, open_low: bool = False) -> float | None:
        """Return a number that is at least low, or above it, and at most high."""
        value = self.take(name, (int, float), "a number")
        if value is None:
            return None
        if not (low < value if open_low else low <= value) or value > high or not math.isfinite(value):
            above = "above" if open_low else "at least"
            raise self._outside(name, value, f"{above} {low:g}" + (f" and at most {high:g}" * math.isfinite(high)))
        return float(value)

    def whole(self, name: str, low: int, high: int, advice: str = "") -> int | None:
        """Return a whole number from low to high."""
        value: int | None = self.take(name, (int, float), "a whole number")
        if value is not None and (isinstance(value, float) or not low <= value <= high):
            raise self._outside(name, value, f"a whole number from {low} to {high}{advice}")
        return value

    def _outside(self, name: str, value: Any, wanted: str) -> ApiError:
        return ApiError(f"{self.path}{name} is {shown(value)}: it must be {wanted}", f"{self.path}{name}")

    def end(self) -> None:
        """Refuse what was not taken.

        Raises:
            ApiError: A parameter is not served, or not known.
        """
        for name, value in self.left.items():
            if not self.path and name in UNSERVED:
                if not any(value == off and type(value) is type(off) for off in UNSERVED[name]):
                    raise unsupported(name)
            else:
                known = f"{self.path}{name[:80]}"
                raise ApiError(f"{known} is not known here: leave it out", known, code="unknown_parameter")
