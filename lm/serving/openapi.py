"""The OpenAPI document of what is served."""

from typing import Any

from lm import __version__
from lm.serving.calls import INT64, ROLES, STOPS, Limits

Json = dict[str, Any]


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _whole(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Json:
    return {"type": "number", "minimum": low, "maximum": high}


FLAG: Json = {"type": "boolean"}
TEXT: Json = {"type": "string"}


def _common(limits: Limits) -> Json:
    """Return the parameters of both kinds of requests."""
    stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_length}
    several = {"type": "array", "items": stop, "maxItems": STOPS}
    bias = {"type": "object", "maxProperties": 1024, "additionalProperties": _number(-100, 100),
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}  # fmt: skip
    options: Json = {
        "n": _whole(1, limits.max_choices), "temperature": _number(0, 2), "top_p": _number(0, 1),
        "min_p": _number(0, 1), "top_k": _whole(-1, INT64 - 1), "seed": _whole(-INT64, INT64 - 1),
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
        "presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2), "logit_bias": bias,
        "stop": {"anyOf": [stop, several]}, "stream": FLAG, "user": TEXT,
        "stream_options": {"type": "object", "properties": {"include_usage": _or_null(FLAG)},
                           "additionalProperties": False},
    }  # fmt: skip
    return {"model": TEXT, **{name: _or_null(schema) for name, schema in options.items()}}


def _completion(limits: Limits) -> Json:
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    prompts = {"type": "array", "items": {"anyOf": [TEXT, ids]}, "minItems": 1, "maxItems": limits.max_choices}
    own = {
        "best_of": _whole(1, limits.max_choices), "echo": FLAG, "logprobs": _whole(0, 5),
        "max_tokens": _whole(0, limits.max_tokens),
    }  # fmt: skip
    return _object(
        {**_common(limits), "prompt": {"anyOf": [TEXT, ids, prompts]}, **{k: _or_null(v) for k, v in own.items()}},
        ["model", "prompt"],
    )


def _chat(limits: Limits) -> Json:
    part = _object({"type": {"const": "text"}, "text": TEXT}, ["type", "text"])
    content = {"anyOf": [TEXT, {"type": "array", "items": part}]}
    message = _object({"role": {"enum": list(ROLES)}, "content": content, "name": _or_null(TEXT)}, ["role", "content"])
    tokens = _whole(1, limits.max_tokens)
    own = {
        "logprobs": FLAG, "top_logprobs": _whole(0, 20), "max_tokens": tokens, "max_completion_tokens": tokens,
        "continue_final_message": FLAG, "add_generation_prompt": FLAG,
    }  # fmt: skip
    messages = {"type": "array", "items": message, "minItems": 1}
    optional = {name: _or_null(schema) for name, schema in own.items()}
    return _object({**_common(limits), "messages": messages, **optional}, ["model", "messages"])


def _object(properties: Json, required: list[str]) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def document(limits: Limits) -> Json:
    """Return the document."""
    error = {"$ref": "#/components/schemas/Error"}

    def operation(summary: str, body: Json | None = None, kind: str = "application/json") -> Json:
        answers: Json = {"200": {"description": "the answer", "content": {kind: {}}}}
        wrong = {"description": "an error", "content": {"application/json": {"schema": error}}}
        answers |= dict.fromkeys(("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"), wrong)
        if body and "stream" in body["properties"]:
            answers["200"]["content"]["text/event-stream"] = {}
        taken = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}} if body else {}
        return {"summary": summary, "responses": answers, **taken}

    asked = {"model": TEXT, "prompt": TEXT}
    tokens = _object({**asked, "return_token_strs": _or_null(FLAG)}, ["model", "prompt"])
    attention = _object({**asked, "layer": _or_null(_whole(0, 1 << 16)), "head": _or_null(_whole(0, 1 << 16))},
                        ["model", "prompt"])  # fmt: skip
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    named = {"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)}
    schema = _object({"error": _object(named, list(named))}, ["error"])
    return {
        "openapi": "3.1.0",
        "info": {"title": "lm serve", "version": __version__},
        "paths": {
            "/v1/completions": {"post": operation("Continue texts.", _completion(limits))},
            "/v1/chat/completions": {"post": operation("Answer in a conversation.", _chat(limits))},
            "/v1/models": {"get": operation("List the checkpoints.")},
            "/v1/models/{name}": {"get": {**operation("One checkpoint."), "parameters": [name]}},
            "/tokenize": {"post": operation("A text's tokens.", tokens)},
            "/attention": {"post": operation("A head's attention over a text.", attention)},
            "/health": {"get": operation("Whether requests are answered.")},
            "/metrics": {"get": operation("Figures for Prometheus.", kind="text/plain")},
        },
        "components": {
            "schemas": {"Error": schema},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
