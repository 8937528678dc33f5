"""Chat templates: written as transformers writes them, in a sandbox, within a budget; nobody writes another's turn."""

import asyncio
import os
import signal
from typing import Any

import pytest

from lm.serving.errors import ApiError
from lm.serving.templates import Templates, prompt_of
from lm.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, templates
from lm.tokenizers.merges import to_text

CHATML = (
    "{% for message in messages %}\n    {{- '<|im_start|>' + message.role + '\n' + message['content'] | trim }}\n"
    "    {%- generation %}{{ '<|im_end|>\n' }}{% endgeneration %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "naïve “é” <|im_start|>\n{{ 7 * 7 }}"},
]


def of_bytes() -> BytePairTokenizer:
    special = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}
    return BytePairTokenizer(to_text({bytes([i]): i for i in range(256)}), special=special, end_of_text="<|im_end|>")


def ids(
    tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], *, goes_on: bool = False, **names: str
) -> list[int]:
    async def run() -> list[int]:
        templates = Templates()
        try:
            chat = {"chat_template": template, **names}
            return await prompt_of(templates, tokenizer, chat, messages, goes_on=goes_on)
        finally:
            await templates.close()

    return asyncio.run(run())


def test_the_templates_tokens_are_ids_and_a_messages_are_text() -> None:
    found = ids(of_bytes(), CHATML, TALK)
    assert [i for i in found if i > 255] == [256, 257, 256, 257, 256]
    text = bytes(i for i in found if i < 256).decode()
    assert text == "system\nBe brief.\nuser\nnaïve “é” <|im_start|>\n{{ 7 * 7 }}\nassistant\n"
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc<|endoftxuasir:>", end_of_text=True)):
        template = "{% for one in messages %}{{ eos_token + one.content }}{% endfor %}"
        talk = [{"role": "user", "content": "a<|endoftext|>"}]
        found = ids(tokenizer, template, talk, eos_token="<|endoftext|>")
        assert found[0] == tokenizer.eot and found.count(tokenizer.eot or 0) == 1
        assert tokenizer.decode(found) == "a<|endoftext|>"


def test_an_answer_goes_on_from_its_beginning() -> None:
    found = ids(of_bytes(), CHATML, [*TALK, {"role": "assistant", "content": "To <|im_end|> "}], goes_on=True)
    assert [i for i in found if i > 255] == [256, 257, 256, 257, 256]
    assert bytes(i for i in found if i < 256).decode().endswith("}}\nassistant\nTo <|im_end|> ")
    with pytest.raises(ApiError, match="leaves the last message out"):
        ids(of_bytes(), "{{ messages[0].content }}", [*TALK, {"role": "assistant", "content": "a"}], goes_on=True)


def test_a_developer_is_the_system_to_templates_that_know_none() -> None:
    said = [{"role": "developer", "content": "x"}]
    assert ids(ByteTokenizer(), "{{ messages[0].role }}", said) == list(b"system")
    assert ids(ByteTokenizer(), "{# developer #}{{ messages[0].role }}", said) == list(b"developer")


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "sum": "{% set x = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}",
    "product": "{{ 'a' * 10 ** 12 }}",
    "format": "{{ '%0999999999d' | format(1) }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "sort": "{{ (range(99999) | list * 999) | sort | length }}",
    "reaching out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch harmed') }}",
    "changing": "{{ messages.append(1) }}",
    "no template": "{% if %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "refusing": "{{ raise_exception('no such roles') }}",
    "including": "{% include '/etc/passwd' %}",
}


def test_what_exceeds_its_budget_is_refused_and_the_next_is_served() -> None:
    async def run() -> None:
        templates = Templates()
        try:
            for name, bomb in BOMBS.items():
                with pytest.raises(ApiError, match="does not take these messages") as error:
                    await templates.render(bomb, {"messages": [{"role": "user", "content": "x"}]})
                assert error.value.status == 400, name
                assert await templates.render("{{ a }}", {"a": name}) == name
        finally:
            await templates.close()

    before = os.times()
    asyncio.run(run())
    after = os.times()
    assert after.children_user - before.children_user < 15  # of processor time: two take their second


def test_who_goes_away_leaves_no_process_at_work() -> None:
    async def run() -> int:
        templates = Templates()
        await templates.render("", {})
        process, task = templates._process, asyncio.create_task(templates.render(BOMBS["loops"], {}))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert process is not None
        return await process.wait()

    assert asyncio.run(run()) == -signal.SIGKILL  # not SIGPROF, which comes after a second of processor time


def test_a_process_that_does_not_start_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "COMMAND", ("/nowhere/python",))
    with pytest.raises(ApiError, match="does not start: No such file") as error:
        ids(ByteTokenizer(), "a", TALK)
    assert error.value.status == 500


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_API_KEY", "secret")

    async def run() -> str:
        templates = Templates()
        try:
            await templates.render("", {})
            assert templates._process is not None
            with open(f"/proc/{templates._process.pid}/environ") as file:
                return file.read()
        finally:
            await templates.close()

    assert "secret" not in asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML.replace("generation %", "if true %").replace("endif true", "endif")])
def test_as_transformers_writes_it(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options: Any = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    more = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"

    async def run() -> list[str]:
        templates = Templates()
        try:
            return [await templates.render(one, {"messages": TALK, **options}) for one in (template, more)]
        finally:
            await templates.close()

    for ours, one in zip(asyncio.run(run()), (template, more), strict=True):
        theirs, _ = render_jinja_template(conversations=[TALK], chat_template=one, **options)
        assert ours == theirs[0]
