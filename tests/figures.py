"""Figures of the code: how long, how dense and how described it is, and which functions go past a cap.

    python tests/figures.py [FOLDER ...] [--worst N]

Definitions. Lines of a function: those with code; docstring, comments and empty lines do not count. Nodes
of a function: of its syntax tree, signature and all. Nodes a statement: the nodes of all functions over the
statements inside them. Complexity: 1 + if, conditional expression, for, while, except, assert, match case,
boolean operators, comprehensions with their conditions. A nested function counts by itself. Parameters:
those of functions, commands and kernels aside: typer reads the options of a function decorated with
`@app.command()` from its signature, and a function decorated with `@triton.jit` has no other way to be
given its tensors and their sizes. Its nodes count in means only: it is one loop over one tile. A parallel
assignment gives several names several expressions (`a, b = 1, 2`); unpacking one value is none.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.Assert | ast.match_case
)
# Each figure: its name, and what it must be.
LIMITS = {
    "function lines, median": ("<=", 8),
    "function lines, p90": ("<=", 30),
    "nodes a statement": ("<=", 14.5),
    "parallel assignments, %": ("<=", 2),
    "complexity, p90": ("<=", 8),
    "complexity, most": ("<=", 15),
    "parameters, p90": ("<=", 4),
    "parameters, most": ("<=", 8),
    "nodes a function, most": ("<=", 400),
    "public docstrings, %": (">=", 100),
    "tensor functions with shapes, %": (">=", 85),
    "constants with units, %": (">=", 100),
}
SHAPE = re.compile(r"\b\w+_[A-Z]{1,6}\b|\[[A-Z0-9][\w+\-* ]*(?:, ?[\w+\-* ]+)*\]|\b0-d\b")
DIMENSIONS = re.compile(r"_[A-Z]{1,6}$")


@dataclass(frozen=True)
class Function:
    """One function's figures."""

    place: str
    lines: int
    nodes: int
    complexity: int
    parameters: int
    kernel: bool  # whether it is compiled for a card
    tensors: bool  # whether it takes or gives tensors
    shaped: bool  # whether it says of what shape


def files(folders: list[Path]) -> list[Path]:
    """The files of Python below `folders`."""
    return sorted(
        path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*.py"))
    )


def functions(path: Path) -> Iterator[Function]:
    """All functions of a file, nested ones too."""
    source = path.read_text(encoding="utf-8")
    lines = _lines_of_code(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTION):
            yield _function(path, node, source, lines)


def _function(path: Path, node: FUNCTION, source: str, lines: set[int]) -> Function:
    docstring = _docstring_lines(node)
    inside = lines & set(range(node.lineno, node.end_lineno + 1)) - docstring
    text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    tensors = _tensors(node)
    return Function(
        place=f"{path}:{node.lineno} {node.name}",
        lines=len(inside),
        nodes=_nodes(node),
        complexity=1 + sum(_branches(child) for child in _own(node)),
        parameters=0 if _is_spared(node) else len(_parameters(node)),
        kernel=_decorated(node, "triton.jit"),
        tensors=bool(tensors),
        shaped=bool(tensors) and (all(map(DIMENSIONS.search, tensors)) or bool(SHAPE.search(text))),
    )


def _lines_of_code(source: str) -> set[int]:
    quiet = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def _docstring_lines(node: ast.AST) -> set[int]:
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return set(range(node.body[0].lineno, node.body[0].end_lineno + 1))


def _nodes(node: FUNCTION) -> int:
    signature = [node.args, *filter(None, [node.returns]), *node.decorator_list]
    return 1 + sum(1 for _ in _own(node)) + sum(1 for part in signature for _ in ast.walk(part))


def _own(node: FUNCTION) -> Iterator[ast.AST]:
    """Nodes of a function, those of functions inside it aside."""
    waiting = list(node.body)
    while waiting:
        child = waiting.pop()
        yield child
        if not isinstance(child, FUNCTION):
            waiting.extend(ast.iter_child_nodes(child))


def _branches(node: ast.AST) -> int:
    if isinstance(node, BRANCHES):
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    return 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0


def _is_spared(node: FUNCTION) -> bool:
    """Whether a function is a command of the command line or a kernel."""
    return _decorated(node, ".command", "triton.jit")


def _decorated(node: FUNCTION, *names: str) -> bool:
    """Whether a function has a decorator whose name ends with one of `names`, as in `@app.command()`."""
    return any(ast.unparse(getattr(one, "func", one)).endswith(names) for one in node.decorator_list)


def _parameters(node: FUNCTION) -> list[ast.arg]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given += [one for one in (node.args.vararg, node.args.kwarg) if one]
    return [one for one in given if one.arg not in ("self", "cls")]


def _tensors(node: FUNCTION) -> list[str]:
    """Names of the parameters that are tensors, and "result" for a result that is one."""
    found = [arg.arg for arg in _parameters(node) if _is_tensor(arg.annotation)]
    return found + (["result"] if _is_tensor(node.returns) else [])


def _is_tensor(annotation: ast.expr | None) -> bool:
    return annotation is not None and bool(re.search(r"\b(Tensor|ndarray)\b", ast.unparse(annotation)))


def statements(tree: ast.AST) -> Iterator[tuple[ast.stmt, int]]:
    """Each statement in a function with its own nodes, those of statements inside it aside."""
    for function in ast.walk(tree):
        if isinstance(function, FUNCTION):
            yield from ((node, _own_nodes(node)) for node in _own(function) if isinstance(node, ast.stmt))


def _own_nodes(statement: ast.stmt) -> int:
    count = 1
    waiting = list(ast.iter_child_nodes(statement))
    while waiting:
        child = waiting.pop()
        if not isinstance(child, ast.stmt):
            count += 1
            waiting.extend(ast.iter_child_nodes(child))
    return count


def parallel(node: ast.stmt) -> bool:
    """Whether an assignment gives several names several expressions."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def undescribed(path: Path) -> Iterator[str]:
    """Public modules, classes and functions without a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{path}:1 module"
    yield from (
        f"{path}:{node.lineno} {node.name}" for node in _public(tree) if ast.get_docstring(node) is None
    )


def _public(tree: ast.AST) -> Iterator[ast.ClassDef | FUNCTION]:
    """Public classes, functions and methods, those with `@overload` and property setters aside."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, FUNCTION | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(one).endswith((".setter", "overload")) for one in node.decorator_list):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from _public(node)


def constants(path: Path) -> Iterator[tuple[str, bool]]:
    """Numbers with a name at the top of a file, and whether a comment says of what they are."""
    source = path.read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(source)).body:
        if not isinstance(node, ast.Assign) or not _number(node.value):
            continue
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        above = source[node.lineno - 2].lstrip() if node.lineno > 1 else ""
        described = "#" in source[node.end_lineno - 1] or above.startswith("#") or _above(source, node.lineno)
        yield from ((f"{path}:{node.lineno} {name}", described) for name in names if name.isupper())


def _above(source: list[str], line: int) -> bool:
    """Whether a comment heads the block of assignments that `line` ends, and so is for all of them."""
    at = line - 2
    while at >= 0 and re.match(r"[A-Z_]+ = ", source[at]):
        at -= 1
    return at >= 0 and source[at].startswith("#")


def _number(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    if isinstance(node, ast.BinOp):
        return _number(node.left) and _number(node.right)
    return isinstance(node, ast.UnaryOp) and _number(node.operand)


def measure(paths: list[Path]) -> dict[str, float]:
    """Every figure of `LIMITS` for some files together."""
    found = [function for path in paths for function in functions(path)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    stated = [(node, count) for tree in trees for node, count in statements(tree)]
    assigned = [node for node, _ in stated if isinstance(node, ast.Assign | ast.AnnAssign)]
    public = sum(bool(tree.body) + sum(1 for _ in _public(tree)) for tree in trees)
    missing = sum(1 for path in paths for _ in undescribed(path))
    tensors = [function for function in found if function.tensors]
    units = [described for path in paths for _, described in constants(path)]
    figures = [
        *_median_and_p90([function.lines for function in found]),
        sum(function.nodes for function in found) / max(len(stated), 1),
        _percent([parallel(node) for node in assigned], none=0),
        *_p90_and_most([function.complexity for function in found]),
        *_p90_and_most([function.parameters for function in found]),
        max((function.nodes for function in found if not function.kernel), default=0),
        100 * (1 - missing / max(public, 1)),
        _percent([function.shaped for function in tensors], none=100),
        _percent(units, none=100),
    ]
    return {name: float(figure) for name, figure in zip(LIMITS, figures, strict=True)}


def _median_and_p90(values: list[int]) -> tuple[float, float]:
    return (np.median(values), np.percentile(values, 90)) if values else (0, 0)


def _p90_and_most(values: list[int]) -> tuple[float, float]:
    return (np.percentile(values, 90), max(values)) if values else (0, 0)


def _percent(values: list[bool], none: float) -> float:
    return 100 * float(np.mean(values)) if values else none


def kept(name: str, figure: float) -> bool:
    """Whether a figure is within its limit."""
    sign, limit = LIMITS[name]
    return figure <= limit if sign == "<=" else figure >= limit


def worst(paths: list[Path], most: int) -> Iterator[str]:
    """For each figure, the places that weigh most in it."""
    found = [function for path in paths for function in functions(path)]
    for figure in ("lines", "nodes", "complexity", "parameters"):
        yield f"\n{figure}:"
        ranked = sorted(found, key=lambda function: -getattr(function, figure))[:most]
        yield from (f"  {getattr(function, figure):5} {function.place}" for function in ranked)
    yield "\nnodes of one statement:"
    dense = [
        (count, f"{path}:{node.lineno}")
        for path in paths
        for node, count in statements(ast.parse(path.read_text(encoding="utf-8")))
    ]
    yield from (f"  {count:5} {place}" for count, place in sorted(dense, reverse=True)[:most])
    yield "\nwithout a docstring:"
    yield from [f"  {place}" for path in paths for place in undescribed(path)][:most]
    yield "\ntensors without a shape:"
    yield from [f"  {function.place}" for function in found if function.tensors and not function.shaped][
        :most
    ]
    yield "\nconstants without a unit:"
    yield from [f"  {place}" for path in paths for place, described in constants(path) if not described][
        :most
    ]


def main() -> int:
    """Print the figures; 1 if one is past its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "limbeck"])
    parser.add_argument(
        "--worst", type=int, default=0, help="how many of the worst places of each figure to name"
    )
    asked = parser.parse_args()
    paths = files(asked.folders)
    figures = measure(paths)
    for name, figure in figures.items():
        sign, limit = LIMITS[name]
        print(f"{name:34} {figure:8.1f}  {sign} {limit:g}{'' if kept(name, figure) else '  <-- no'}")
    if asked.worst:
        print("\n".join(worst(paths, asked.worst)))
    return 0 if all(kept(name, figure) for name, figure in figures.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
