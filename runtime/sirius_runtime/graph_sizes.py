"""Symbolic sizes: expressions for sizes that are not known before a graph runs.

A size is an int, or an `Expression`: a polynomial of symbols with integer coefficients. A symbol is
a letter of an entry's shapes (`B` rows, `T` tokens, …), which is 1 or more, or a term that is not a
polynomial: ``min(n, T)``, ``(T)//(2)``. The name of such a term is its text, so equal terms are
equal symbols. Two sizes are equal only if they are equal for all values of their symbols.
"""

from __future__ import annotations

from typing import TypeAlias

from sirius_runtime.errors import ArtifactError

Size: TypeAlias = "int | Expression"
Terms: TypeAlias = dict[tuple[str, ...], int]
"""The coefficient of each product of symbols (a sorted tuple); () has the constant term."""


class Expression:
    """A polynomial that is not a constant; immutable."""

    __slots__ = ("_hash", "_key", "terms")

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._key = frozenset(terms.items())
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = []
        for symbols, factor in sorted(self.terms.items()):
            parts.append("*".join([*([] if factor == 1 and symbols else [str(factor)]), *symbols]))
        return " + ".join(parts)


UNSIGNED = "?"
"""The prefix of the names of symbols that may be negative."""
_MOST_TERMS = 64  # of an expression, and most symbols in one product
_LONGEST = 400  # characters of a symbol's name


def symbol(name: str) -> Expression:
    """A size that is the symbol of that name."""
    return Expression({(name,): 1})


def add(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = dict(_terms(a))
    for symbols, factor in _terms(b).items():
        terms[symbols] = terms.get(symbols, 0) + factor
    return _made(terms)


def multiply(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    terms: Terms = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            symbols = tuple(sorted(left + right))
            terms[symbols] = terms.get(symbols, 0) + x * y
    return _made(terms)


def subtract(a: Size, b: Size) -> Size:
    return add(a, multiply(b, -1))


def product(sizes: tuple[Size, ...] | list[Size]) -> Size:
    """The product of all sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def floor_divide(a: Size, b: Size) -> Size:
    """a // b: a polynomial where b divides a, else a new symbol. b must not be 0."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide(a, b)
    return named(f"({a})//({b})") if exact is None else exact


def divide(a: Size, b: Size) -> Size | None:
    """a / b where that is a polynomial, by long division; else None."""
    divisor, left, result = _terms(b), dict(_terms(a)), dict[tuple[str, ...], int]()
    first = max(divisor, key=_order)
    if divisor[first] == 0:
        return None
    for _ in range(_MOST_TERMS):
        if not any(left.values()):
            return _made(result)
        largest = max(left, key=_order)
        symbols, factor = _without(largest, first), left[largest]
        if symbols is None or factor % divisor[first]:
            return None
        factor //= divisor[first]
        result[symbols] = factor
        for own, value in divisor.items():
            place = tuple(sorted(own + symbols))
            left[place] = left.get(place, 0) - value * factor
            if not left[place]:
                del left[place]
    return None


def _order(symbols: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Sort key of products: by degree, then by symbols. It is a monomial order, as long division
    needs: multiplying two products by a third keeps their order.
    """
    return len(symbols), symbols


def _without(symbols: tuple[str, ...], divisor: tuple[str, ...]) -> tuple[str, ...] | None:
    rest = list(symbols)
    for one in divisor:
        if one not in rest:
            return None
        rest.remove(one)
    return tuple(rest)


def named(text: str) -> Expression:
    """A symbol named `text`, of which only is known that it is 0 or more."""
    if len(text) > _LONGEST:
        raise ArtifactError("its sizes are computed in more steps than any graph of ours takes")
    return symbol(text)


def at_least(size: Size, least: int) -> bool:
    """Whether a size is at least `least` (0 or 1) for all values of its symbols."""
    terms = _terms(size)
    for symbols, factor in terms.items():
        if symbols and (factor < 0 or any(one.startswith(UNSIGNED) for one in symbols)):
            return False
    constant = terms.get((), 0)
    ones = sum(f for s, f in terms.items() if s and all(_is_letter(one) for one in s))
    return constant + ones >= least


def _is_letter(name: str) -> bool:
    """Whether a symbol is a shape letter, which is 1 or more; other symbols are 0 or more."""
    return name.isalpha()


def _terms(size: Size) -> Terms:
    return size.terms if isinstance(size, Expression) else {(): size}


def _made(terms: Terms) -> Size:
    kept = {symbols: factor for symbols, factor in terms.items() if factor}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    if len(kept) > _MOST_TERMS or max(map(len, kept)) > _MOST_TERMS:
        raise ArtifactError("its sizes are computed in more steps than any graph of ours takes")
    return Expression(kept)
