"""A filter on cells, an expression over obs columns: parsed to a tree of a few allowed nodes, never run as code.

`disease == "normal" and suspension_type != "na" and is_primary_data` · `n_genes >= 200` · `tissue in ["blood"]` ·
`not obs["cell type"] == "doublet"`. A missing value equals nothing and is in nothing, so `!=` and `not in` hold for
it.
"""
import ast
import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scgpt.errors import ConfigError

Scalar = str | int | float | bool
_ORDER = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_COMPARE: dict[str, Callable[[pa.Array, pa.Scalar], pa.Array]] = {
    "==": pc.equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_MAX_CHARACTERS = 10_000
_HELP = 'write a comparison of obs columns, for example disease == "normal" and is_primary_data'


@dataclass(frozen=True, slots=True)
class ObsFilter:
    """A parsed filter: the columns it reads, and what it keeps."""

    text: str
    columns: tuple[str, ...]
    _body: ast.expr

    @classmethod
    def parse(cls, text: str) -> "ObsFilter":
        """Read an expression; ConfigError when it is not one, or uses anything but comparisons, and, or, not, in."""
        try:
            if len(text) > _MAX_CHARACTERS:
                raise ConfigError(f"a filter of {len(text)} characters is too long", fix="shorten it")
            body = ast.parse(text.strip(), mode="eval").body
            columns: dict[str, None] = {}
            _check(body, text, columns)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"the filter '{text}' is not an expression", fix=_HELP) from error
        return cls(text, tuple(columns), body)

    def keep(self, obs: Mapping[str, pa.Array], *, where: str) -> NDArray[np.bool_]:
        """Which cells satisfy the filter, (cells,).

        Args:
            obs: column name -> values, (cells,) each: dictionary, string, number or boolean arrays; nulls allowed.
            where: the source, for messages.

        Raises ConfigError when the source lacks a column, or a column is compared with a value of another type.
        """
        for name in self.columns:
            if name not in obs:
                raise missing_column(name, list(obs), what=f"the filter '{self.text}'", where=where)
        return _evaluate(self._body, obs, where)


def missing_column(name: str, columns: Sequence[str], *, what: str, where: str) -> ConfigError:
    """The error for `what` (a setting, in words) naming an obs column that a source lacks."""
    close = difflib.get_close_matches(name, columns, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return ConfigError(f"{what} needs the obs column '{name}', which this source lacks", where=where,
                       fix=f"{hint}its columns: {', '.join(sorted(columns)) or 'none'}")


def _check(node: ast.expr, text: str, columns: dict[str, None]) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, text, columns)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text, columns)
    elif (name := _column(node)) is not None:
        columns[name] = None
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for left, comparison, right in zip(sides, node.ops, sides[1:], strict=False):
            _terms(left, comparison, right, text, columns)
    else:
        raise _refused(node, text)


def _terms(left: ast.expr, comparison: ast.cmpop, right: ast.expr, text: str, columns: dict[str, None]) -> None:
    names = [_column(left), _column(right)]
    membership = isinstance(comparison, ast.In | ast.NotIn)
    if isinstance(comparison, ast.Is | ast.IsNot) or (names[0] is None) == (names[1] is None):
        raise ConfigError(f"the filter '{text}' must compare one column with one value", fix=_HELP)
    if membership and not (names[0] is not None and isinstance(right, ast.List | ast.Tuple | ast.Set)):
        raise ConfigError(f"the filter '{text}' uses `in` without a list", fix='write column in ["one", "other"]')
    columns[names[0] or names[1] or ""] = None
    for constant in right.elts if isinstance(right, ast.List | ast.Tuple | ast.Set) else [left, right]:
        if _column(constant) is None:
            _constant(constant, text)


def _refused(node: ast.expr, text: str) -> ConfigError:
    return ConfigError(f"the filter '{text}' uses '{ast.unparse(node)}', which is not allowed", fix=_HELP)


def _column(node: ast.expr) -> str | None:
    """The name of a column: `name`, or `obs["name"]`."""
    if isinstance(node, ast.Name):
        return node.id
    if (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "obs"
            and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
        return node.slice.value
    return None


def _constant(node: ast.expr, text: str) -> Scalar:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if isinstance(constant, ast.Constant) and isinstance(constant.value, str | int | float):
        if not negative:
            return constant.value
        if isinstance(constant.value, int | float):
            return -constant.value
    raise _refused(node, text)


def _evaluate(node: ast.expr, obs: Mapping[str, pa.Array], where: str) -> NDArray[np.bool_]:
    if isinstance(node, ast.BoolOp):
        return reduce(operator.and_ if isinstance(node.op, ast.And) else operator.or_,
                      (_evaluate(value, obs, where) for value in node.values))
    if isinstance(node, ast.UnaryOp):
        return ~_evaluate(node.operand, obs, where)
    name = _column(node)
    if name is not None:
        return _holds(obs[name], "==", value=True, name=name, where=where)
    if not isinstance(node, ast.Compare):
        raise TypeError("an expression that was not checked")
    sides = [node.left, *node.comparators]
    return reduce(operator.and_, (_compare(left, comparison, right, obs, where)
                                  for left, comparison, right in zip(sides, node.ops, sides[1:], strict=False)))


def _compare(left: ast.expr, comparison: ast.cmpop, right: ast.expr, obs: Mapping[str, pa.Array],
             where: str) -> NDArray[np.bool_]:
    sign = _ORDER.get(type(comparison), "==" if isinstance(comparison, ast.Eq | ast.In) else "!=")
    name, other = _column(left), right
    if name is None:
        name, other, sign = _column(right) or "", left, _MIRRORED[sign]
    if isinstance(other, ast.List | ast.Tuple | ast.Set):
        found = np.zeros(len(obs[name]), bool)
        for item in other.elts:
            found |= _holds(obs[name], "==", _constant(item, ""), name=name, where=where)
        return found if isinstance(comparison, ast.In) else ~found
    value = _constant(other, "")
    if sign == "!=":
        return ~_holds(obs[name], "==", value, name=name, where=where)
    return _holds(obs[name], sign, value, name=name, where=where)


def _holds(column: pa.Array, sign: str, value: Scalar, *, name: str, where: str) -> NDArray[np.bool_]:
    """`column sign value` for each cell; false where the value is missing. Categories are compared once each."""
    if isinstance(column, pa.DictionaryArray):
        per_category = _holds(column.dictionary, sign, value, name=name, where=where)
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        chosen: NDArray[np.bool_] = np.append(per_category, [False])[codes]
        return chosen
    if isinstance(value, bool) and pa.types.is_string(column.type):   # h5ad files often keep flags as words
        column, value = pc.utf8_lower(column), str(value).lower()
    kinds = (pa.types.is_string(column.type), pa.types.is_boolean(column.type))
    if kinds != (isinstance(value, str), isinstance(value, bool)):
        held = "text" if kinds[0] else "true or false" if kinds[1] else "numbers"
        raise ConfigError(f"the filter compares the column '{name}', which holds {held}, with {value!r}", where=where,
                          fix="compare it with a value of its own type")
    holds: NDArray[np.bool_] = _COMPARE[sign](column, pa.scalar(value)).fill_null(fill_value=False).to_numpy(
        zero_copy_only=False)
    return holds
