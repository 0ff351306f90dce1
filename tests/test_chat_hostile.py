"""A chat template of a stranger reaches nothing of this process, and ends."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sirius_runtime import template_guard
from sirius_runtime.chat import Chat, ChatSpec
from sirius_runtime.errors import ArtifactError
from tests.support.fast import gate_but

TEXT = "x" * 1000
DOUBLED = "{% set x = 'a' * 1000 %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}"
NESTED = "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 60

HOSTILE = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that choose": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "text in loops": f"{{% for i in range(99999) %}}{TEXT}{{% endfor %}}",
    "captured in loops": f"{{% set x %}}{{% for i in range(99999) %}}{TEXT}{{% endfor %}}{{% endset %}}",
    "a macro of itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    ),
    "a recursive loop": ("{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}"),
    "times": "{{ 'a' * 999999999999 }}",
    "times, turned": "{{ 99999999999 * [1] }}",
    "times times": "{{ ('a' * 1000000) * 1000 }}",
    "doubled": DOUBLED,
    "doubled by plus": DOUBLED.replace("~", "+"),
    "doubled by capture": (
        "{% set x = 'a' * 1000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40
    ),
    "doubled by format": "{% set x = 'a' * 1000 %}" + "{% set x = '%s%s' % (x, x) %}" * 40,
    "doubled by join": "{% set x = 'a' * 1000 %}" + "{% set x = [x, x] | join %}" * 40,
    "doubled by replace": "{% set x = 'a' * 9000 %}" + "{% set x = x | replace('a', x) %}" * 3,
    "doubled by str.replace": "{% set x = 'a' * 9000 %}" + "{% set x = x.replace('a', x) %}" * 3,
    "doubled by str.join": "{% set x = 'a' * 9000 %}" + "{% set x = x.join(x) %}" * 3,
    "doubled by a namespace": (
        "{% set n = namespace(x='a' * 1000) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}"
    ),
    "nested, written": NESTED + "{{ x }}",
    "nested, as JSON": NESTED + "{{ x | tojson }}",
    "nested, compared": NESTED + NESTED.replace("x", "y") + "{{ x == y }}",
    "nested, in a dict": "{% set x = 'a' %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x }}",
    "nested, by dict()": "{% set x = 'a' %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
    "nested namespaces": (
        "{% set x = 'a' %}" + "{% set x = namespace(a=x, b=x) %}" * 60 + "{{ x }}"
    ),
    "wide by ljust": "{{ 'a'.ljust(99999999999) }}",
    "wide by zfill": "{{ 'a'.zfill(9999999999) }}",
    "wide by center": "{{ 'a' | center(9999999999) }}",
    "wide by format": "{{ '{:>9999999999}'.format('a') }}",
    "wide by a nested format": "{{ '{:>{w}}'.format('a', w=9999999999) }}",
    "wide by %": "{{ '%9999999999s' % 'a' }}",
    "wide by %*": "{{ '%*s' % (9999999999, 'a') }}",
    "wide by tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "wide by indent": "{{ ('\n' * 100000) | indent(100000, blank=true) }}",
    "wide by indent's text": "{{ ('\n' * 100000) | indent('x' * 100000, blank=true) }}",
    "wide by tojson": "{{ [1, 2] | tojson(indent=9999999999) }}",
    "wide by tojson, deep": (
        "{% set n = namespace(x=range(10000) | list) %}{% for i in range(90) %}"
        "{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson(indent=6000) }}"
    ),
    "batches": "{{ [1] | batch(9999999999, 'x') | list }}",
    "batches, mapped": "{{ [[1]] | map('batch', 9999999999, 'x') | map('list') | list }}",
    "slices": "{{ [1] | slice(9999999999) | list }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "powers, again": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "rounding": "{{ 1.5 | round(9999999999, 'ceil') }}",
    "ranges": "{{ range(9999999999) | list }}",
    "lorem ipsum": "{{ lipsum(999999) }}",
    "deep brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "globals": "{{ cycler.__init__.__globals__ }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attributes by attr": "{{ messages | attr('__class__') | attr('mro') }}",
    "attributes by map": "{{ [messages] | map(attribute='__class__') | list | first | attr('mro') }}",
    "the environment": "{{ self._TemplateReference__context.environment.budget.step(-9) }}",
    "a namespace's class": "{% set n = namespace(__class__=1) %}",
    "the messages": "{{ messages.append(1) }}",
    "a message": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "files": "{% include '/etc/hostname' %}",
}


@pytest.mark.parametrize("name", gate_but(HOSTILE, HOSTILE.keys() - {"a tree of macros"}))
def test_it_is_stopped_at_once(name: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    chat = Chat(ChatSpec({"default": HOSTILE[name]}))
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=r"chat template 'default' (is stopped|failed|can't)"):
        chat.render(messages)
    assert time.monotonic() - start < template_guard.MOST_SECONDS + 5
    assert messages == [{"role": "user", "content": "a"}]


def test_what_the_sandbox_hides_is_undefined() -> None:
    """Not an error, as in transformers, and nothing."""
    for source in (
        "{{ ''.__class__ }}",
        "{{ messages.__len__ }}",
        "{{ raise_exception.__globals__ }}",
    ):
        assert Chat(ChatSpec({"a": source})).render([{"role": "user", "content": "a"}]) == ""


def test_the_clock_stops_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_guard, "MOST_SECONDS", -1.0)
    with pytest.raises(ArtifactError, match="more than -1 seconds"):
        Chat(ChatSpec({"a": "{% for m in messages %}{% endfor %}"})).render(
            [{"role": "user", "content": "a"}]
        )


def test_each_rendering_has_limits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_guard, "MOST_STEPS", 30)
    chat = Chat(ChatSpec({"a": "{% for m in messages %}.{% endfor %}"}))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}] * 20
    for _ in range(5):
        assert chat.render(messages) == "." * 20


def test_long_conversations_are_within_the_limits() -> None:
    from tests.support.templates import CHATML, MACROS

    turns = [{"role": r, "content": "word " * 200} for r in ("user", "assistant")] * 1000
    for template in (CHATML, MACROS):
        chat = Chat(ChatSpec({"a": template}, {"eos_token": "</s>"}))
        assert len(chat.render(turns)) > 40_000
