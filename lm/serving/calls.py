"""What a client asks for: the parameters of completions and of chats, as OpenAI and vLLM name them, checked."""

from dataclasses import dataclass, field
from typing import Any

from lm.generation import Sampler
from lm.serving.errors import ApiError, unsupported
from lm.serving.values import Values, kind, shown

STOPS = 4
ROLES = ("system", "developer", "user", "assistant")
INT64 = 2**63


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for, and how long things may take.

    Args:
        max_requests: Requests in work and waiting; the next one is refused with status 429.
        max_tokens: Longest continuation.
        max_prompt_tokens: Longest prompt; the network's context by default.
        max_choices: Texts that one request makes: prompts times best_of or n.
        max_stop_length: Characters of a stop string.
        max_body_bytes: Of a request.
        timeout: Seconds for a request, from its last byte to the last of its answer.
        body_timeout: Seconds in which a request must arrive.
        grace: Seconds for what runs when the server is stopped.
    """

    max_requests: int = 256
    max_tokens: int = 4096
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    max_stop_length: int = 256
    max_body_bytes: int = 1 << 20
    timeout: float = 600
    body_timeout: float = 30
    grace: float = 30


Prompt = str | list[int]


@dataclass(kw_only=True)
class Call:
    """A checked request.

    Args:
        model: The checkpoint's name.
        chat: Whether it is a chat.
        prompts: Of a completion: texts, or ids.
        messages: Of a chat.
        goes_on: Whether a chat's last message is the beginning of the answer.
        n: Choices for each prompt.
        best_of: Texts for each prompt, of which the n likeliest are returned.
        echo: Whether the prompt is part of the text.
        stream: Whether it is answered in events.
        include_usage: Whether the last event tells the numbers of tokens.
        logprobs: Of how many likeliest tokens log-probabilities are told; None for none.
        max_tokens: Longest continuation; None for what the context leaves.
        sampler: Chooses the tokens.
        seed: Of the first choice; each further one adds 1.
        stop: Strings that end the text.
        logit_bias: Ids, and what is added to their logits.
        presence_penalty: See `lm.generation.engine.Request`.
        frequency_penalty: See there.
    """

    model: str
    chat: bool
    prompts: list[Prompt] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    goes_on: bool = False
    n: int
    best_of: int
    echo: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    max_tokens: int | None
    sampler: Sampler
    seed: int | None
    stop: tuple[str, ...]
    logit_bias: tuple[tuple[int, float], ...]
    presence_penalty: float
    frequency_penalty: float


def parse(body: dict[str, Any], chat: bool, limits: Limits) -> Call:
    """Return the call of a request's JSON.

    Raises:
        ApiError: A value is missing, of a wrong type or out of its range, or asks for what is not served.
    """
    values = Values(body)
    model = values.text("model")
    if model is None:
        raise ApiError("model is missing: name one of /v1/models", "model")
    prompts = [] if chat else _prompts(values, limits)
    messages = _messages(values) if chat else []
    echo = not chat and values.flag("echo")
    n = values.whole("n", 1, limits.max_choices) or 1
    best_of = (None if chat else values.whole("best_of", 1, limits.max_choices)) or n
    if best_of < n:
        raise ApiError(f"best_of is {best_of} and n {n}: it must be at least n", "best_of")
    if (texts := best_of * max(1, len(prompts))) > limits.max_choices:
        name = "best_of" if best_of > n else "n" if n > 1 else "prompt"
        raise ApiError(f"{name}: the request makes {texts} texts, at most {limits.max_choices} are allowed", name)
    stream, include_usage = _stream(values)
    if stream and best_of > n:
        raise ApiError(f"best_of is {best_of}: its texts cannot be streamed before the best is known", "best_of")
    call = Call(
        model=model, chat=chat, prompts=prompts, messages=messages, goes_on=chat and _goes_on(values, messages),
        n=n, best_of=best_of, echo=echo, stream=stream, include_usage=include_usage, logprobs=_logprobs(values, chat),
        max_tokens=_max_tokens(values, chat, echo, limits), sampler=_sampler(values),
        seed=values.whole("seed", -INT64, INT64 - 1), stop=_stops(values, limits), logit_bias=_bias(values),
        presence_penalty=values.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=values.number("frequency_penalty", -2, 2) or 0.0,
    )  # fmt: skip
    values.text("user")  # who asks makes no difference to the answer
    values.end()
    return call


def _prompts(values: Values, limits: Limits) -> list[Prompt]:
    """Return the prompts: a text, ids, or an array of either."""
    found = values.take("prompt", (str, list), "a string, an array of ids, or an array of either")
    if found is None:
        raise ApiError("prompt is missing: give a string, or an array of ids", "prompt")
    if isinstance(found, str):
        return [found]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in found)
    several: list[Any] = [found] if found and whole else found
    if not several:
        raise ApiError("prompt is empty: give at least one", "prompt")
    if len(several) > limits.max_choices:
        raise ApiError(f"prompt has {len(several)} prompts: at most {limits.max_choices} are allowed", "prompt")
    for one in several:
        ids = isinstance(one, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in one)
        if not isinstance(one, str) and not (ids and one):
            raise ApiError(f"prompt has {shown(one)}: give a string, or an array of ids, at least one", "prompt")
    return several


def _messages(values: Values) -> list[dict[str, str]]:
    """Return a conversation's messages, each with role and content, and a name where it has one."""
    found = values.take("messages", list, "an array")
    if not found:
        raise ApiError("messages are missing: give at least one", "messages")
    messages = []
    for i, one in enumerate(found):
        path = f"messages[{i}]"
        if not isinstance(one, dict):
            raise ApiError(f"{path} is {kind(one)}: it must be an object with role and content", path)
        message = Values(one, f"{path}.")
        role, name = message.text("role"), message.text("name")
        if role not in ROLES:
            raise ApiError(f"{path}.role is {shown(role)}: it must be one of {', '.join(ROLES)}", f"{path}.role")
        content = _content(message, path)
        message.end()
        messages.append({"role": role, "content": content} | ({"name": name} if name else {}))
    return messages


def _goes_on(values: Values, messages: list[dict[str, str]]) -> bool:
    """Return whether the last message is the beginning of the answer: a pair of flags, as vLLM has them."""
    goes_on, new = values.flag("continue_final_message"), values.take("add_generation_prompt", bool, "true or false")
    if new is goes_on:
        text = f"add_generation_prompt is {shown(new)}: it must be the opposite of continue_final_message"
        raise ApiError(text, "add_generation_prompt")
    if goes_on and messages[-1]["role"] != "assistant":
        text = "continue_final_message: the last message is not the assistant's: leave it out"
        raise ApiError(text, "continue_final_message")
    return goes_on


def _content(message: Values, path: str) -> str:
    """Return a message's text, which may be given in parts."""
    content = message.take("content", (str, list), "a string, or an array of text parts")
    if content is None:
        raise ApiError(f"{path}.content is missing: give a string", f"{path}.content")
    if isinstance(content, str):
        return content
    texts = []
    for k, part in enumerate(content):
        where = f"{path}.content[{k}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ApiError(f"{where} is no part with a type: it must be of type text", where)
        if part["type"] != "text":
            raise unsupported(f"{where} of type {part['type'][:40]}", "only text is")
        of_part = Values(part, f"{where}.")
        of_part.text("type")
        text = of_part.text("text")
        if text is None:
            raise ApiError(f"{where}.text is missing: give a string", f"{where}.text")
        of_part.end()
        texts.append(text)
    return "".join(texts)


def _stream(values: Values) -> tuple[bool, bool]:
    """Return whether the answer is streamed, and whether with the numbers of tokens."""
    stream = values.flag("stream")
    found = values.take("stream_options", dict, "an object")
    if found is None:
        return stream, False
    if not stream:
        raise ApiError("stream_options is for streams: say stream true, or leave it out", "stream_options")
    options = Values(found, "stream_options.")
    include = options.flag("include_usage")
    if options.flag("include_obfuscation"):
        raise unsupported("stream_options.include_obfuscation")
    options.end()
    return stream, include


def _logprobs(values: Values, chat: bool) -> int | None:
    if not chat:
        return values.whole("logprobs", 0, 5)
    wanted, top = values.flag("logprobs"), values.whole("top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs true", "top_logprobs")
    return (top or 0) if wanted else None


def _max_tokens(values: Values, chat: bool, echo: bool, limits: Limits) -> int | None:
    """Return the longest continuation; 0 is for who wants the prompt's log-probabilities alone."""
    low, high = int(not echo), limits.max_tokens
    advice = ", this server's limit"
    if not chat:
        found = values.whole("max_tokens", low, high, advice)
        return min(16, high) if found is None else found
    old, new = (values.whole(name, 1, high, advice) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise ApiError(f"max_tokens is {old} and max_completion_tokens {new}: say one of them", "max_tokens")
    return old if new is None else new


def _sampler(values: Values) -> Sampler:
    """Return the sampler; top_k is off at 0 and -1, as vLLM has it, and the least top_p leaves the likeliest token."""
    temperature = values.number("temperature", 0, 2)
    top_p, min_p = values.number("top_p", 0, 1), values.number("min_p", 0, 1)
    top_k = values.whole("top_k", -1, INT64 - 1)
    return Sampler(
        temperature=1.0 if temperature is None else temperature,
        top_k=None if top_k in (None, -1, 0) else top_k,
        top_p=None if top_p in (None, 1) else max(top_p or 0, 1e-9),
        min_p=min_p or None,
        repetition_penalty=values.number("repetition_penalty", 0, 100, open_low=True) or 1.0,
    )


def _stops(values: Values, limits: Limits) -> tuple[str, ...]:
    found = values.take("stop", (str, list), "a string, or an array of strings")
    stops = [] if found is None else [found] if isinstance(found, str) else found
    if len(stops) > STOPS:
        raise ApiError(f"stop has {len(stops)} strings: at most {STOPS} are allowed", "stop")
    for one in stops:
        if not isinstance(one, str) or not one:
            raise ApiError(f"stop has {shown(one)}: it must be a string that is not empty", "stop")
        if len(one) > limits.max_stop_length:
            raise ApiError(f"stop has a string of {len(one)} characters: at most {limits.max_stop_length}", "stop")
    return tuple(stops)


def _bias(values: Values) -> tuple[tuple[int, float], ...]:
    found = values.take("logit_bias", dict, "an object of ids and numbers") or {}
    if len(found) > 1024:
        raise ApiError(f"logit_bias has {len(found)} ids: at most 1024 are allowed", "logit_bias")
    pairs: dict[int, float] = {}
    for name in found:
        if not (name.isascii() and name.isdigit() and len(name) < 10) or int(name) in pairs:
            raise ApiError(f"logit_bias has {shown(name)}: its names must be ids of tokens, each once", "logit_bias")
        bias = Values(found, "logit_bias.").number(name, -100, 100)
        pairs[int(name)] = bias or 0.0
    return tuple(pairs.items())
