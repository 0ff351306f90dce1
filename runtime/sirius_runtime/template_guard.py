"""The Jinja environment of chat templates: transformers' own, sandboxed, and within limits.

A template comes with an untrusted artifact. The sandbox hides other objects from it, but does not
stop endless loops or memory use. So every step of a loop, every call and the length of every text
is counted, and the size of a result that can grow is estimated first. A template over the limits
raises `TemplateLimitError`.

Only this module imports jinja2; it is itself imported when a template is first rendered.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_TEXT = 2**26
"""Characters (and elements of lists) that a rendering may make, intermediate ones counted."""
MOST_STEPS = 2**18
"""Steps of loops, and calls, of one rendering; a thousand messages take some ten thousand."""
MOST_SECONDS = 5.0
"""Seconds that a rendering may take."""
_MOST_ELEMENTS = 2**18  # of one value, nested ones each time that they stand there
_MOST_NUMBER = 2**20  # of one that says how long a text becomes
_MOST_BITS = 2**16  # of a number

# What is made of each may be as long as the text it is called on, times what it is called with.
_FORMATS = frozenset(("format", "format_map", "%"))
_TIMES_ARGUMENTS = _FORMATS | {"replace", "join", "translate", "indent", "wordwrap"}
# … times the largest number that it is called with.
_TIMES_NUMBER = frozenset(
    "ljust rjust center zfill expandtabs indent wordwrap tojson batch slice round * **".split()
)
_COMPUTED_WIDTH = re.compile(r"\{[^{}]*\{|%[^a-zA-Z]*\*")
# No template of a chat has a use for these, and they may take long.
_LEFT_OUT = ("urlize", "xmlattr")


class TemplateLimitError(Exception):
    """A template does more than any that makes a prompt."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._steps, self._text = MOST_STEPS, MOST_TEXT
        self._end = time.monotonic() + MOST_SECONDS

    def step(self, count: int = 1) -> None:
        """Counts steps."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self._end:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} seconds")

    def write(self, size: int) -> None:
        """Counts characters that are made."""
        self._text -= size
        if self._text < 0:
            raise TemplateLimitError(f"it makes more than {MOST_TEXT} characters")


def weigh(value: Any) -> int:
    """The characters, digits and elements of a value, nested ones each time that they stand there:
    an upper bound of the length of its text, but for what quoting adds. Raises TemplateLimitError
    for a value that is too large for any use.
    """
    total, elements, left = 0, 0, [value]
    while left:
        one = left.pop()
        elements += 1
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, int):
            if one.bit_length() > _MOST_BITS:
                raise TemplateLimitError(f"it makes a number of more than {_MOST_BITS} bits")
            total += one.bit_length() // 3
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            left += one
        elif isinstance(one, Namespace):
            left.append(one._Namespace__attrs)
        if elements + len(left) > _MOST_ELEMENTS:
            raise TemplateLimitError(f"it makes a value of more than {_MOST_ELEMENTS} elements")
    return total + elements


def _check_growth(name: str, values: Sequence[Any]) -> None:
    """Estimates the size of the result of `values[0]`'s operation `name` on the other values."""
    parts = [weigh(value) for value in values]
    bound = sum(parts)
    if name in _TIMES_ARGUMENTS and parts:
        bound = max(bound, parts[0] * sum(parts[1:]))
    number = _number(name, values)
    if number > _MOST_NUMBER:
        raise TemplateLimitError(f"{name} with the number {number} makes too much")
    if max(bound, sum(parts) * number) > MOST_TEXT:
        raise TemplateLimitError(f"{name} may make more than {MOST_TEXT} characters")


def _number(name: str, values: Sequence[Any]) -> int:
    """The largest number that determines the result's size; 0 if there is none."""
    if name in _FORMATS and isinstance(values[0], str):
        if _COMPUTED_WIDTH.search(values[0]):
            raise TemplateLimitError(f"{name} takes a width from its arguments")
        return max((int(digits[:9]) for digits in re.findall(r"\d+", values[0])), default=0)
    of_numbers = all(isinstance(value, int | float) for value in values)
    if name not in _TIMES_NUMBER or (name == "*" and of_numbers):
        return 0  # a product of numbers has the digits of both
    sizes = values if name == "*" else values[1:]
    return max((abs(value) for value in sizes if isinstance(value, int)), default=0)


class _Generator(CodeGenerator):
    """Jinja's code, with what is made and repeated handed to the environment."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        raise nodes.Impossible  # all text is counted as it is written

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        each = nodes.EnvironmentAttribute("each")
        node.iter = nodes.Call(each, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """``{% generation %}``, which marks an answer for training: here its content, and no more."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict``, without the attributes of the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace``, without attributes that Python gives a meaning to."""

    def __init__(*args: Any, **fields: Any) -> None:  # so that a field may be called `self`
        attributes = dict(*args[1:], **fields)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers renders chat templates in; `budget` is that of the rendering in progress.

    One thread at a time renders.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._written,
            optimized=False,  # nothing is computed as a template is read
            cache_size=0,
        )
        self.budget = Budget()
        self.filters = {
            name: self._guarded(name, function)
            for name, function in self.filters.items()
            if name not in _LEFT_OUT
        }
        self.filters["tojson"] = self._guarded("tojson", self._tojson)
        self.globals.pop("lipsum")
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call(__self, __context: Context, __obj: Any, *args: Any, **fields: Any) -> Any:  # noqa: N805
        __self.budget.step()
        function = getattr(__obj, "__wrapped__", __obj)
        own = getattr(function, "__self__", None)
        given = [*args, *fields.values()]
        if isinstance(own, str | bytes | list | tuple | dict):
            _check_growth(function.__name__, [own, *given])
        else:
            weigh(given)
        return super().call(__context, __obj, *args, **fields)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        _check_growth(operator, [left, right])
        return super().call_binop(context, operator, left, right)

    def each(self, values: Iterable[Any]) -> list[Any]:
        """What a loop goes through."""
        items = list(islice(values, MOST_STEPS + 1))
        self.budget.step(len(items))
        return items

    def joined(self, context: Context, parts: tuple[Any, ...]) -> str:
        """``a ~ b``"""
        self.budget.write(weigh(parts))
        join = markup_join if context.eval_ctx.autoescape else str_join
        return join(parts)

    def measured(self, value: Any) -> Any:
        """A list, tuple or dict that a template writes down."""
        weigh(value)
        return value

    def _written(self, value: Any) -> Any:
        self.budget.write(weigh(value))
        return value

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose growth is estimated first; how jinja2 passes its context stays."""
        passed = 1 if getattr(function, "jinja_pass_arg", None) else 0

        @functools.wraps(function)  # with the mark of what it is passed
        def guarded(*args: Any, **fields: Any) -> Any:
            self.budget.step()
            _check_growth(name, [*args[passed:], *fields.values()])
            return function(*args, **fields)

        return guarded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers' filter: jinja2's own escapes HTML."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

        def counted() -> Iterator[str]:
            for part in encoder.iterencode(value):
                self.budget.write(len(part))
                yield part

        return "".join(counted())


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
