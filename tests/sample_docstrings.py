"""Docstrings drawn at random, with name and signature, for a reader to grade: plain at once, read twice,
obscure.

python tests/sample_docstrings.py [--count 60] [--seed 0] [FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DESCRIBED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """Place and signature, and docstring, of everything in a folder that has one."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, DESCRIBED) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(folder)}: {signature(node)}", text


def signature(node: DESCRIBED) -> str:
    """`def name(parameters) -> result`, `class name`, or `module`."""
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){result}"


def main() -> None:
    """Print the sample, numbered."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "limbeck")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    population = list(docstrings(options.folder))
    sample = random.Random(options.seed).sample(population, options.count)
    print(f"{options.count} of {len(population)} docstrings, seed {options.seed}\n")
    for number, (place, text) in enumerate(sample, start=1):
        indented = text.replace("\n", "\n    ")
        print(f"{number}. {place}\n    {indented}\n")


if __name__ == "__main__":
    main()
