"""Rows by an expression over their columns, as in `sparsity == 0.6 and criterion == 'wanda'`.

Nothing is run: of Python's expressions only comparisons, arithmetic and their connection are understood, by this file.
"""

from __future__ import annotations

import ast
import operator
import re
import tokenize
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any, NoReturn

import pandas as pd

from raysweep.errors import UsageError, nearest_name

EXAMPLE = "sparsity == 0.6 and criterion in ['wanda', 'ria']"
LONGEST, DEEPEST = 2000, 40  # letters of an expression, and levels of it
MOST_NAMED, LONGEST_NAMED = 12, 60  # values of a column that an answer names, and letters of one
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_WORDS = {"&": " and ", "|": " or "}  # as in pandas, where they bind like these words
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def rows_where(rows: pd.DataFrame, expression: str) -> pd.DataFrame:
    """The rows for which the expression is true; a comparison with what is null is not. Raises UsageError.

    Names are columns (others than plain ones in `backticks`), values numbers, quoted texts, true, false and null;
    == != < <= > >= in and not or + - * / and parentheses connect them.
    """
    reading = _Reading(rows, expression)
    return rows[reading.truth(reading.tree).to_numpy(bool)]


def texts_of_no_row(rows: pd.DataFrame, expression: str) -> list[str]:
    """What an expression of `rows_where` asks for and no row has, beside what its column has: a slip of the pen, or
    words of the table, which joins columns."""
    reading = _Reading(rows, expression)
    return list(dict.fromkeys(reading.texts_of_no_row(reading.tree)))


class _Reading:
    """Reads one expression over the columns of `rows`."""

    def __init__(self, rows: pd.DataFrame, expression: str) -> None:
        if len(expression) > LONGEST:
            _refuse(expression, f"is longer than {LONGEST} letters")
        self._rows, self._expression, self._columns = rows, expression, list(map(str, rows.columns))
        source, self._quoted = _plain(expression)
        try:
            self.tree = ast.parse(source.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            _refuse(expression, "is no expression (== compares, and or not are small)")

    def texts_of_no_row(self, node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                yield from self.texts_of_no_row(part)
        if isinstance(node, ast.Compare):  # not those behind a `not`
            for left, kind, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators, strict=False
            ):
                if isinstance(kind, ast.Eq | ast.In):
                    yield from self._absent(left, right)
                    yield from self._absent(right, left)

    def _absent(self, column: ast.expr, other: ast.expr) -> Iterator[str]:
        """Of the texts in one side of a comparison those that no row has, where the other side is a column of texts."""
        name = self._quoted.get(column.id, column.id) if isinstance(column, ast.Name) else None
        if name not in self._columns:
            return
        there = self._texts(name)
        if not there:
            return
        legible = max(map(len, there)) <= LONGEST_NAMED
        known = ", ".join(there[:MOST_NAMED]) + (", ..." if len(there) > MOST_NAMED else "")
        for text in (each.value for each in ast.walk(other) if isinstance(each, ast.Constant)):
            if isinstance(text, str) and text not in there:
                elsewhere = [each for each in self._columns if text in self._texts(each)]
                meant = f"; {' or '.join(elsewhere)} has that" if elsewhere else ""
                yield f"no trial has {name} {text!r}" + (f"; there are {known}" if legible else "") + meant

    def _texts(self, column: str) -> list[str]:
        """The different ones of a column; none of one that holds something else."""
        return [value for value in self._rows[column].dropna().unique() if isinstance(value, str)]

    def truth(self, node: ast.expr, depth: int = 0) -> pd.Series:
        """By row whether it is so."""
        if depth > DEEPEST:
            _refuse(self._expression, f"has more than {DEEPEST} levels")
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(part, depth + 1) for part in node.values]
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            whole = parts[0]
            for part in parts[1:]:
                whole = join(whole, part)
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
            return ~self.truth(node.operand, depth + 1)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return self._same(node.value)
        if isinstance(node, ast.Name):
            value = self._value(node)
            if isinstance(value, bool):
                return self._same(value)
            if isinstance(value, pd.Series) and pd.api.types.is_bool_dtype(value):
                return _known(value)
        return _refuse(self._expression, f"has {self._said(node)!r} where something is true or false")

    def _comparison(self, node: ast.Compare) -> pd.Series:
        """All of a chain, such as 0.5 <= sparsity < 0.7."""
        whole, left = self._same(True), node.left
        for kind, right in zip(node.ops, node.comparators, strict=True):
            try:
                whole &= self._compared(kind, left, right)
            except (TypeError, ValueError, OverflowError):
                _refuse(
                    self._expression,
                    f"compares what does not compare: {self._said(left)} and {self._said(right)}",
                )
            left = right
        return whole

    def _compared(self, kind: ast.cmpop, left: ast.expr, right: ast.expr) -> pd.Series:
        first = self._value(left)
        if isinstance(kind, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not isinstance(first, pd.Series):
                _refuse(
                    self._expression, "has `in` with something else than a column before and a list behind it"
                )
            values = [self._value(one) for one in right.elts]
            if None in values:
                _refuse(self._expression, "has null in a list; write `or` and == null")
            among = first.isin(values)
            return among if isinstance(kind, ast.In) else ~among & first.notna()
        second = self._value(right)
        if first is None or second is None:
            return self._null(kind, second if first is None else first)
        compare = _COMPARED.get(type(kind))
        if compare is None:
            _refuse(self._expression, "has `is`, which compares no values; write ==")
        found = compare(first, second)
        if not isinstance(found, pd.Series):
            return self._same(bool(found))
        there = [side.notna() for side in (first, second) if isinstance(side, pd.Series)]
        truth = _known(found)
        for known in there:
            truth &= known
        return truth

    def _null(self, kind: ast.cmpop, other: Any) -> pd.Series:
        """== null and != null: whether a column does not apply."""
        if not isinstance(kind, ast.Eq | ast.NotEq | ast.Is | ast.IsNot):
            _refuse(self._expression, "compares with null otherwise than by == and !=")
        missing: pd.Series = other.isna() if isinstance(other, pd.Series) else self._same(other is None)
        return missing if isinstance(kind, ast.Eq | ast.Is) else ~missing

    def _value(self, node: ast.expr, depth: int = 0) -> Any:
        if depth > DEEPEST:
            _refuse(self._expression, f"has more than {DEEPEST} levels")
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self._number(node.operand, depth)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and (compute := _COMPUTED.get(type(node.op))) is not None:
            try:
                return compute(self._number(node.left, depth), self._number(node.right, depth))
            except (ZeroDivisionError, OverflowError):
                _refuse(self._expression, f"computes what is no number: {self._said(node)}")
        return _refuse(self._expression, f"has {self._said(node)!r}, which is not understood")

    def _number(self, node: ast.expr, depth: int) -> Any:
        value = self._value(node, depth + 1)
        if isinstance(value, pd.Series) and pd.api.types.is_numeric_dtype(value):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        return _refuse(self._expression, f"computes with {self._said(node)!r}, which is no number")

    def _named(self, name: str) -> Any:
        column = self._quoted.get(name, name)
        if column in self._columns:
            return self._rows[column]
        if name in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[name]
        raise UsageError(
            f"unknown column {column!r}",
            where="--where",
            nearest=nearest_name(column, self._columns),
            allowed=", ".join(self._columns),
            remedy="Texts stand in quotes: criterion == 'wanda'.",
        )

    def _same(self, value: bool) -> pd.Series:
        return pd.Series(value, index=self._rows.index, dtype=bool)

    def _said(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        for name, column in self._quoted.items():
            text = text.replace(name, f"`{column}`")
        return text[:60]


def _known(truth: pd.Series) -> pd.Series:
    """What is null is not so."""
    return truth.fillna(False).astype(bool)


def _plain(expression: str) -> tuple[str, dict[str, str]]:
    """With names for what stands in backticks, and `and` and `or` for & and |."""
    names: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        if found[0][0] != "`":
            return found[0]
        name = f"column_in_backticks_{len(names)}"
        names[name] = found[0][1:-1]
        return name

    source = _QUOTED.sub(named, expression)
    try:
        tokens = list(tokenize.generate_tokens(StringIO(source).readline))
        words = [(token.type, _WORDS.get(token.string, token.string)) for token in tokens]
        return tokenize.untokenize(words).replace("\n", " "), names
    except (tokenize.TokenError, SyntaxError):
        return source, names


def _refuse(expression: str, what: str) -> NoReturn:
    raise UsageError(
        f"{expression[:80]!r} {what}",
        where="--where",
        allowed="columns, numbers and 'texts', connected by == != < <= > >= in, and or not, + - * / and parentheses",
        remedy=f'For example: --where "{EXAMPLE}"',
    )
