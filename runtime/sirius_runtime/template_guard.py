"""The Jinja environment of chat templates: that of transformers, sandboxed and with limits.

A template comes with an untrusted artifact. The sandbox hides other objects from it, but does not
stop endless loops or memory use. So every loop step, every call and the length of every text is
counted, and the size of a result that can grow is estimated before it is computed. A template that
exceeds a limit raises `TemplateLimitError`.

This module imports jinja2. It is imported when a template is first rendered.
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
"""The most characters (and list elements) of a rendering, including intermediate results."""
MOST_STEPS = 2**18
"""The most loop steps and calls of a rendering; a thousand messages take about ten thousand."""
MOST_SECONDS = 5.0
"""The most seconds of a rendering."""
_MOST_ELEMENTS = 2**18  # of one value; a nested value counts each time that it occurs
_MOST_NUMBER = 2**20  # an argument that determines the length of a text
_MOST_BITS = 2**16  # of an integer

# The result may be as long as the text it is called on, times the length of the arguments.
_FORMATS = frozenset(("format", "format_map", "%"))
_TIMES_ARGUMENTS = _FORMATS | {"replace", "join", "translate", "indent", "wordwrap"}
# The result may be as long as the text, times the largest number among the arguments.
_TIMES_NUMBER = frozenset(
    "ljust rjust center zfill expandtabs indent wordwrap tojson batch slice round * **".split()
)
_COMPUTED_WIDTH = re.compile(r"\{[^{}]*\{|%[^a-zA-Z]*\*")
# Filters that are removed: chat templates do not need them, and they may take long.
_LEFT_OUT = ("urlize", "xmlattr")


class TemplateLimitError(Exception):
    """A template exceeds a limit."""


class Budget:
    """The steps, characters and time that are left for one rendering."""

    def __init__(self) -> None:
        self._steps, self._text = MOST_STEPS, MOST_TEXT
        self._end = time.monotonic() + MOST_SECONDS

    def step(self, count: int = 1) -> None:
        """Counts steps; raises TemplateLimitError over the limit of steps or time."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self._end:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} seconds")

    def write(self, size: int) -> None:
        """Counts characters; raises TemplateLimitError over the limit."""
        self._text -= size
        if self._text < 0:
            raise TemplateLimitError(f"it makes more than {MOST_TEXT} characters")


def weigh(value: Any) -> int:
    """The number of characters, digits and elements of a value; a nested value counts each time
    that it occurs. This bounds the length of the value's text, without quotes. Raises
    TemplateLimitError for a value that is too large.
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
    """Raises TemplateLimitError if the result of the operation `name` of `values[0]` with the other
    values may be too large.
    """
    parts = [weigh(value) for value in values]
    bound = sum(parts)
    if name in _TIMES_ARGUMENTS and parts:
        bound = max(bound, parts[0] * sum(parts[1:]))
    number = _number(name, values)
    if number > _MOST_NUMBER:
        raise TemplateLimitError(f"{name} with the number {number} may make too long a text")
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
    """Jinja's code generator, which also calls the environment for loops, joins and literals."""

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
    """``{% generation %}``, which marks an answer for training; only its content is rendered."""

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
    """``namespace``, without attributes that begin with an underscore."""

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
    """The environment in which transformers renders chat templates, with limits.

    `budget` is that of the current rendering, so only one thread may render at a time.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._written,
            optimized=False,  # else constants would be computed while a template is compiled
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
        """The items of a loop, counted as steps."""
        items = list(islice(values, MOST_STEPS + 1))
        self.budget.step(len(items))
        return items

    def joined(self, context: Context, parts: tuple[Any, ...]) -> str:
        """The result of ``a ~ b``, counted."""
        self.budget.write(weigh(parts))
        join = markup_join if context.eval_ctx.autoescape else str_join
        return join(parts)

    def measured(self, value: Any) -> Any:
        """A list, tuple or dict literal of a template, checked for its size."""
        weigh(value)
        return value

    def _written(self, value: Any) -> Any:
        self.budget.write(weigh(value))
        return value

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that first estimates the size of its result. Arguments that jinja2 passes (as a
        context) are still passed.
        """
        passed = 1 if getattr(function, "jinja_pass_arg", None) else 0

        @functools.wraps(function)  # copies jinja2's mark of the argument to pass
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
        """transformers' filter `tojson`: jinja2's would escape HTML."""
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
