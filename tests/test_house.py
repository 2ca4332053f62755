"""The house rules that a machine can keep: doors open downward only, nothing heavy at the door, no attic."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import figures
import pytest

import limbeck

HOUSE = Path(limbeck.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

# A room may use itself and the rooms on floors below. `engine`, `tasks` and `train` are not for one another:
# loops take them as arguments.
FLOORS = {
    "types": 0, "files": 0, "config": 0, "text": 0, "run_log": 0, "activity": 0,
    "model": 1,
    "engine": 2, "tasks": 2, "train": 2,
    "eval": 3, "runtime": 3, "plan": 3, "cluster": 3,
    "report": 4,
    "pipeline": 5,
    "api": 6, "cli": 6, "serve": 6, "__main__": 6,
}  # fmt: skip
TOP = 6  # rooms of the top floor and those of the ground floor may also use their neighbours
GROUND = {"numpy", "pydantic", "tokenizers", "yaml", "jinja2"}
NEVER = {"transformers", "trl", "ray", "vllm", "lm_eval", "datasets", "accelerate"}
NETWORK = {"urllib", "requests", "httpx", "http", "socket", "aiohttp", "huggingface_hub", "openai"}
HARMLESS = ("urllib.parse", "http.cookies")  # these only read what is written in them
BESIDE = 5  # modules beside the packages
DOOR = 4  # times what typer takes: as long may `limbeck --help` take


def room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path, whole: bool = True) -> set[str]:
    """Absolute names of what a file imports: anywhere in it, or without `whole` at its own import."""
    package = ("limbeck", *path.relative_to(HOUSE).parts[:-1])
    found = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), whole):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [
                    *(package[: len(package) - node.level + 1] if node.level else ()),
                    *filter(None, [node.module]),
                ]
            )
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def _nodes(tree: ast.AST, whole: bool):
    """Every node; without `whole`, none inside a function or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if not whole and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not whole and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node, whole)


def rooms_used(path: Path) -> set[str]:
    """Rooms of the house that a file imports from, lazily or not."""
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == "limbeck" and len(parts) > 1 and parts[1] in FLOORS}


def reached(names: set[str]) -> set[str]:
    """Those that open connections."""
    return {name for name in names if name.split(".")[0] in NETWORK and not name.startswith(HARMLESS)}


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent != HOUSE or p.stem != "__init__"],
    ids=lambda p: str(p.relative_to(HOUSE)),
)
def test_doors_open_downward_only(path):
    """Also the doors inside functions: a lazy import hides a dependency and does not remove it."""
    mine = room(path)
    assert mine in FLOORS, f"{mine} has no floor: give it one in docs and here"
    beside = {r for r, floor in FLOORS.items() if floor == FLOORS[mine] and floor in (0, TOP)} | {mine}
    allowed = {r for r, floor in FLOORS.items() if floor < FLOORS[mine]} | beside
    assert rooms_used(path) <= allowed


def test_the_plan_uses_recipe_and_shapes_only():
    for path in (HOUSE / "plan").rglob("*.py"):
        used = {name for name in imports(path) if name.startswith("limbeck.")}
        assert all(
            name.startswith(
                (
                    "limbeck.plan",
                    "limbeck.config.recipe",
                    "limbeck.config.parts",
                    "limbeck.types",
                    "limbeck.model.config",
                )
            )
            for name in used
        )


def test_the_ground_floor_stands_on_little():
    for name in (r for r, floor in FLOORS.items() if floor == 0):
        files = [path for path in FILES if room(path) == name]
        outside = {i.split(".")[0] for path in files for i in imports(path)} - {"limbeck"}
        assert files and outside <= GROUND | set(sys.stdlib_module_names), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_no_file_uses_a_reference_or_reaches_out_when_imported(path):
    """Not even lazily do we use what we are tested against; the network is opened inside functions only."""
    anywhere = {name.split(".")[0] for name in imports(path)}
    assert not anywhere & NEVER
    assert not reached(imports(path, whole=False))


def test_only_pull_serving_and_remote_models_know_of_the_network():
    users = {path for path in FILES if reached(imports(path))}
    assert {str(path.relative_to(HOUSE)) for path in users if room(path) != "serve"} <= {
        "model/pull.py",
        "engine/openai_client.py",
        "engine/vllm_client.py",
    }


def loaded(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter after importing `modules`."""
    lines = [f"import {module}" for module in modules]
    code = "; ".join([*lines, "import sys", "print(*{name.partition('.')[0] for name in sys.modules})"])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_clean()
    )
    return set(run.stdout.split())


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}


def test_the_door_is_light():
    """The package, the command line, recipes and shapes are read without torch."""
    found = loaded("limbeck", "limbeck.cli", "limbeck.config.recipe", "limbeck.types", "limbeck.model.config")
    assert "limbeck" in found and not found & {"torch", "matplotlib", "sympy", "pyarrow", "fastapi", *NEVER}


def test_the_whole_house_loads_no_reference_implementation():
    triton = importlib.util.find_spec("triton")
    modules = [
        ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts)
        for path in FILES
        if path.stem != "__init__" and (triton or not _is_card_s(path))
    ]
    found = loaded(*modules)
    assert "torch" in found and not found & NEVER


DEVICES = re.compile(r"\bis_cuda\b|\.device\.type\b|\btorch\.(cuda|mps|accelerator)\b|\bimport triton\b")
ASKED = {"cli/doctor.py"}  # tell what the machine has, and run nothing on it


def _is_card_s(path: Path) -> bool:
    """Whether a file belongs to the kernels of a card."""
    parts = path.relative_to(HOUSE).parts
    return parts[:2] == ("model", "cuda") or parts[:3] == ("model", "ops", "cuda.py")


def test_only_the_table_of_operations_knows_of_devices():
    """What differs from device to device is an operation; everything else asks the table it was given."""
    found = {
        str(path.relative_to(HOUSE)): DEVICES.findall(path.read_text(encoding="utf-8"))
        for path in FILES
        if not _is_card_s(path) and path.parent != HOUSE / "model" / "ops"
    }
    assert {path for path, names in found.items() if names} <= ASKED


def test_every_table_has_every_operation():
    """With the same parameters, in the same order."""
    from limbeck.model.ops import CPUOps, MPSOps, Ops, PlainOps

    wanted = {name: value for name, value in vars(Ops).items() if inspect.isfunction(value)}
    names = {name for name in wanted if not name.startswith("_")}
    assert len(names) > 15
    for table in (PlainOps, CPUOps, MPSOps):
        for name in names:
            asked = list(inspect.signature(wanted[name]).parameters)
            assert list(inspect.signature(getattr(table, name)).parameters) == asked, (table, name)
        assert set(Ops.__annotations__) <= set(dir(table))


def test_the_public_hand():
    assert {"Engine", "Learner", "Recipe", "Run", "Task", "run"} <= set(limbeck.__all__)
    for name in limbeck.__all__:
        assert getattr(limbeck, name).__name__ == name
    assert set(limbeck.__all__) <= set(dir(limbeck))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = limbeck.Trainer


def test_the_top_holds_packages_and_few_files():
    """Who opens the package sees its rooms, and no more than what all of them hand to one another."""
    assert len([path for path in FILES if path.parent == HOUSE and path.stem != "__init__"]) <= BESIDE


def test_files_are_nouns_of_the_field_and_can_be_read():
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "core", "misc"}
    assert not {path for path in FILES if path.stem in vague or path.parent.name in vague}


@pytest.mark.parametrize("figure", figures.LIMITS)
def test_the_code_is_as_simple_as_it_was_meant(measured, figure):
    """`python tests/figures.py limbeck --worst 10` names the places."""
    assert figures.kept(figure, measured[figure]), measured[figure]


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return figures.measure(FILES)


def test_help_is_there_at_once():
    """No more than a few times what its library for commands takes to be imported; torch alone takes ten
    times that."""

    def processor_seconds(code: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_clean()
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, run.stdout

    helped, bare = [], []
    for _ in range(3):
        bare.append(processor_seconds("import typer, rich.console")[0])
        spent, out = processor_seconds(
            "import sys; sys.argv = ['limbeck', '--help']; from limbeck.cli import main; main()"
        )
        assert "Usage: limbeck" in out
        helped.append(spent)
    print(f"limbeck --help: {min(helped):.2f} s of the processor's; typer alone: {min(bare):.2f} s")
    assert min(helped) < DOOR * min(bare)


def test_the_index_leads_to_what_it_names():
    """docs/explanation/design.md, "Where is ...": every file is there, and defines one of the names beside
    it; every name is defined."""
    page = (HOUSE.parent / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## Where is ...")[2].partition("\n\n`limbeck/recipes/`")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 25
    for topic, paths, names in rows:
        files = [HOUSE / path for path in re.findall(r"`(.*?)`", paths)]
        texts = [path.read_text(encoding="utf-8") for path in files]
        for name in re.findall(r"`(.*?)`", names):
            assert any(re.search(rf"(?m)\b(def|class|void) {name}\b|^{name}\b", text) for text in texts), (
                f"{topic}: {name}"
            )
