"""Solution cells with one mistake each: what grading must notice.

Operators change one node of the reference solution (libcst keeps the rest to the letter). They know nothing of
attacks or statistics, so that they also make mistakes that nobody thought of when the contracts were written.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Mutant:
    """One solution cell with one mistake. `diff` tells it from every other of its exercise."""

    exercise: str
    operator: str
    source: str
    diff: str


def mutants(exercise: str, source: str) -> list[Mutant]:
    """Every mutant of a solution cell, in the order of the source; only the solution itself is changed."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    positions = wrapper.resolve(PositionProvider)
    lines = [line.strip() for line in source.splitlines()]
    first, last = lines.index(BEGIN) + 1, lines.index(END) + 1
    found: dict[str, Mutant] = {}
    for node in _walk(wrapper.module):
        if node in positions and first < positions[node].start.line < last:
            for operator, changed in _changes(node):
                text = cst.ensure_type(wrapper.module.deep_replace(node, changed), cst.Module).code
                diff = _diff(source, text)
                if diff and _compiles(text):
                    found.setdefault(diff, Mutant(exercise, operator, text, diff))
    return list(found.values())


def equivalent(path: Path = EQUIVALENT) -> dict[tuple[str, str], str]:
    """The mutants that are no mistakes, by exercise and diff, each with the reason that a reviewer gave."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return {(entry["exercise"], entry["diff"].strip("\n")): entry["reason"] for entry in entries}


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _diff(before: str, after: str) -> str:
    """The changed lines alone, without their indentation."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in list(lines)[2:] if line[0] in "+-")


def _compiles(source: str) -> bool:
    try:
        compile(source, "cell", "exec")
    except SyntaxError:
        return False
    return True


# --- operators: from a node to the nodes that may take its place -----------------------------------------

Change = tuple[str, cst.CSTNode]

_COMPARISONS: dict[type[cst.BaseCompOp], tuple[cst.BaseCompOp, ...]] = {
    cst.LessThan: (cst.LessThanEqual(), cst.GreaterThan()),
    cst.LessThanEqual: (cst.LessThan(), cst.GreaterThan()),
    cst.GreaterThan: (cst.GreaterThanEqual(), cst.LessThan()),
    cst.GreaterThanEqual: (cst.GreaterThan(), cst.LessThan()),
    cst.Equal: (cst.NotEqual(),),
    cst.NotEqual: (cst.Equal(),),
    cst.In: (cst.NotIn(),),
    cst.NotIn: (cst.In(),),
    cst.Is: (cst.IsNot(),),
    cst.IsNot: (cst.Is(),),
}
_ARITHMETIC: dict[type[cst.BaseBinaryOp], tuple[cst.BaseBinaryOp, ...]] = {
    cst.Add: (cst.Subtract(),),
    cst.Subtract: (cst.Add(),),
    cst.Multiply: (cst.Divide(),),
    cst.Divide: (cst.Multiply(),),
    cst.FloorDivide: (cst.Divide(),),
    cst.Power: (cst.Multiply(),),
    cst.BitAnd: (cst.BitOr(),),
    cst.BitOr: (cst.BitAnd(),),
    cst.MatrixMultiply: (cst.Multiply(),),
}
_TWINS = {  # methods and functions that are mistaken for each other
    **{"amax": "amin", "amin": "amax", "max": "min", "min": "max", "argmax": "argmin", "any": "all"},
    **{"all": "any", "sum": "mean", "mean": "sum", "rand": "randn", "clamp_min": "clamp_max"},
    **{
        "maximum": "minimum",
        "minimum": "maximum",
        "eval": "train",
        "train": "eval",
        "ppf": "cdf",
        "cdf": "ppf",
    },
    **{"low": "high", "high": "low", "floor": "ceil", "ceil": "floor", "add": "discard"},
}


def _changes(node: cst.CSTNode) -> Iterator[Change]:
    match node:
        case cst.ComparisonTarget(operator=operator):
            for other in _COMPARISONS.get(type(operator), ()):
                yield "comparison", node.with_changes(operator=other)
        case cst.BinaryOperation(operator=operator):
            for arithmetic in _ARITHMETIC.get(type(operator), ()):
                yield "arithmetic", node.with_changes(operator=arithmetic)
        case cst.BooleanOperation(operator=cst.And()):
            yield "boolean", node.with_changes(operator=cst.Or())
        case cst.BooleanOperation():
            yield "boolean", node.with_changes(operator=cst.And())
        case cst.UnaryOperation(expression=expression):
            yield "sign", expression
        case cst.Integer() | cst.Float():
            yield from _numbers(node)
        case cst.Name(value="True" | "False"):
            yield "constant", node.with_changes(value="False" if node.value == "True" else "True")
        case cst.SimpleString():
            yield "constant", cst.SimpleString('"?"')
        case cst.IfExp(body=body, orelse=orelse):
            yield "branch", node.with_changes(body=orelse, orelse=body)
        case cst.If(test=test):
            yield "branch", node.with_changes(test=cst.parse_expression(f"not ({_code(test)})"))
        case cst.Call():
            yield from _calls(node)
        case cst.Attribute(attr=cst.Name(value=name)) if name in _TWINS:
            yield "twin", node.with_changes(attr=cst.Name(_TWINS[name]))
        case cst.Subscript(value=value):
            yield "index", value
        case cst.With(body=body):
            yield "context", cst.If(test=cst.Name("True"), body=body, leading_lines=node.leading_lines)
        case cst.SimpleStatementLine(body=[cst.Return(value=cst.BaseExpression() as value)]):
            yield from _returns(node, value)
        case cst.SimpleStatementLine():
            yield "dropped", node.with_changes(body=[cst.Pass()])


def _numbers(node: cst.Integer | cst.Float) -> Iterator[Change]:
    value = float(node.value) if isinstance(node, cst.Float) else int(node.value)
    others = (value + 1, value - 1) if isinstance(value, int) else (2 * value, value / 2)
    for other in others:
        yield "constant", cst.parse_expression(repr(other))


def _calls(node: cst.Call) -> Iterator[Change]:
    positional = [argument for argument in node.args if argument.keyword is None and not argument.star]
    match node.func:
        case cst.Attribute(value=value, attr=name) if not (
            isinstance(value, cst.Name) and value.value in _MODULES
        ):
            yield f"no {name.value}", value
        case cst.Name(value="range") if len(positional) == 1:
            for sign in "+-":
                yield (
                    "off by one",
                    node.with_changes(
                        args=[cst.Arg(cst.parse_expression(f"{_code(positional[0].value)} {sign} 1"))]
                    ),
                )
        case _ if len(positional) == 1 == len(node.args):
            yield f"no {_code(node.func)}", positional[0].value
    for i, (a, b) in enumerate(itertools.pairwise(positional)):
        swapped = list(node.args)
        swapped[i], swapped[i + 1] = a.with_changes(value=b.value), b.with_changes(value=a.value)
        yield "swapped", node.with_changes(args=swapped)
    for i, argument in enumerate(node.args):
        if argument.keyword is not None:
            yield f"no {argument.keyword.value}", node.with_changes(args=_without(node.args, i))


_MODULES = {"torch", "F", "np", "math", "stats", "nn"}


def _without(arguments: Sequence[cst.Arg], i: int) -> list[cst.Arg]:
    kept = [argument for j, argument in enumerate(arguments) if j != i]
    return [*kept[:-1], kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)] if kept else []


def _returns(line: cst.SimpleStatementLine, value: cst.BaseExpression) -> Iterator[Change]:
    """Another result: nothing at all, or one of a pair in the other's place."""
    yield "dropped", line.with_changes(body=[cst.Return()])
    if isinstance(value, cst.Tuple) and len(value.elements) == 2:
        a, b = value.elements
        swapped = value.with_changes(elements=[a.with_changes(value=b.value), b.with_changes(value=a.value)])
        yield "swapped", line.with_changes(body=[cst.Return(swapped)])


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)
