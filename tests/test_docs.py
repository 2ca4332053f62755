"""The documentation tells the truth: its commands run, its recipes load, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from pydantic import TypeAdapter

from limbeck.cli import app, first_recipe
from limbeck.config import recipe
from limbeck.config.hosts import Hosts
from limbeck.config.load import dump, load, shipped
from limbeck.tasks.registry import open_task
from limbeck.types import Completion

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
NOT_OURS = {"runs", "models", "build", "site", "__pycache__"}
TEXT = {".py", ".md", ".yaml", ".toml", ".css", ".jinja", ".js", ""}


def call(command: str | list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


def commands(block: str) -> list[str]:
    """The lines of a shell block without their comments."""
    lines = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in block.splitlines()]
    return [line for line in lines if line]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


def tour() -> list[str]:
    """The commands of the tutorial's tour."""
    (block,) = (block for block in blocks(DOCS / "tutorial" / "first-run.md", "sh") if "smoke" in block)
    return commands(block)


# ---------------------------------------------------------------- commands


def test_readmes_say_the_same():
    for language in ("sh", "yaml"):
        english, chinese = (list(map(commands, blocks(page, language))) for page in (ENGLISH, CHINESE))
        assert english and english == chinese
    for pattern in (r"(?<!`)`[^`\n]+`", r"\]\(((?!README)[^)]+)\)", r"^#+ ()", r"^    (.+)"):
        pattern = f"(?m){pattern}"
        english, chinese = (sorted(re.findall(pattern, prose(page))) for page in (ENGLISH, CHINESE))
        assert english == chinese


@pytest.mark.timeout(1800)
def test_tour(tmp_path):
    """Every command of the tour as it is written; the second run of the first one does nothing twice."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def carry_out(command: str) -> str:
        done = call(command, shell=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def manifests() -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("runs/tour/store/*/manifest.json")}

    first, *others = tour()
    assert "begins" in carry_out(first)
    before = manifests()
    assert "begins" not in carry_out(first)
    assert before and manifests() == before
    said = {shlex.split(command)[1]: carry_out(command) for command in others}
    assert "steps: 3 -> 4" in said["plan"]
    assert said["status"].count("done") == len(before)
    assert said["verify"].count("as it was") == len(before)
    assert all(said.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    """What needs the network, or long, is not run: its words and options exist, and its recipes load."""
    known = typer.main.get_command(app).commands
    for line in (line for block in blocks(page, "sh") for line in commands(block)):
        program, *words = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if program != "limbeck":
            continue
        options = {option for parameter in known[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line
        for name in set(words) & set(shipped()):
            load(name)


def test_pull_says_what_it_does():
    program = [sys.executable, "-c", "from limbeck.cli import main; main()", "pull", "--help"]
    done = call(program)
    assert done.returncode == 0 and "NAME" in done.stdout


def test_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"run", "test"} <= set(targets)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "path", sorted((ROOT / "limbeck" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_load(path):
    loaded = load(path)
    assert loaded.name == path.stem
    assert yaml.safe_load(dump(loaded)) == loaded.model_dump(mode="json")


def examples() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            yield f"{page.name}-{number}", block


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in examples()])
def test_yaml_blocks_load(block, tmp_path):
    """A whole recipe, some problems, hosts, or some stages."""
    tree = yaml.safe_load(block)
    if "stages" in tree:
        (tmp_path / "example.yaml").write_text(block, encoding="utf-8")
        load(tmp_path / "example.yaml")
    elif "problems" in tree:
        recipe.Recipe.model_validate({"name": "example", "stages": {}, **tree})
    elif "seats" in tree:
        Hosts.model_validate(tree)
    else:
        TypeAdapter(dict[str, recipe.AnyStage]).validate_python(tree)


def test_worked_example(tmp_path):
    """The guide's row of JSONL, read by the guide's recipe, and judged."""
    guide = DOCS / "how-to" / "bring-model-and-problems.md"
    (row,) = map(json.loads, blocks(guide, "json"))
    example = next(block for block in blocks(guide, "yaml") if "source: files" in block)
    rows = [{**row, "question": f"{row['question']} ({i})"} for i in range(400)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = TypeAdapter(dict[str, recipe.Problems]).validate_python(yaml.safe_load(example)["problems"])
    task = open_task("sums", problems["sums"], tmp_path)
    problem = task.problems("train")[0]
    assert row["question"] in problem.prompt and "\\boxed{}" in problem.prompt
    text = f"<think> 7 times 12 </think> \\boxed{{{row['answer']}}}"
    score = task.score(problem, Completion(np.zeros(1, int), np.zeros(1), text, stopped=True, sample=0))
    assert score.parts["accuracy"] == score.parts["format"] == 1


def test_the_tutorial_s_problems_and_its_stage_are_what_init_writes(tmp_path):
    """The tutorial's script writes the file that it shows, and `limbeck init` makes its stage of it."""
    tutorial = DOCS / "tutorial" / "your-own-model.md"
    script = next(block for block in blocks(tutorial, "python") if "problems.jsonl" in block)
    assert call([sys.executable, "-c", script], cwd=tmp_path).returncode == 0
    lines = (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == blocks(tutorial, "json")[0].strip() and len(lines) == 400
    source = first_recipe.problems.read_problems(str(tmp_path / "problems.jsonl"), "", 1.3e8, tmp_path)
    assert source.notes[0].partition(": ")[2] in tutorial.read_text(encoding="utf-8")
    facts = {"template": "own_model", "name": "problems", "problems": "problems", "model": "smollm2-135m"}
    facts |= {"rate": first_recipe.recipe.RATES[0][1], "source": source}
    (tmp_path / "problems.yaml").write_text(
        first_recipe.recipe._render(facts, first_recipe.sizes.Sizes(40, False, ""))
    )
    written = load(tmp_path / "problems.yaml").stages["zero"]
    shown = yaml.safe_load(next(block for block in blocks(tutorial, "yaml") if "kind: rl" in block))
    stage = TypeAdapter(dict[str, recipe.AnyStage]).validate_python(shown)["zero"]
    assert stage.model_copy(update={"log_every": 1}) == written


def test_the_page_on_advantages_says_what_its_example_prints(tmp_path):
    page = DOCS / "explanation" / "advantage-scale.md"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = call([sys.executable, "-c", blocks(page, "python")[0]], cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == (blocks(page, "text")[0], "")


API_EXAMPLES = [
    ("run", {"base", "zero", "report"}),
    ("results", {"finished", "rewards", "zero"}),
    ("model", set()),
    ("errors", {"mistake:"}),
    ("recipe", {"2"}),
    ("task", {"What"}),
    ("judged", {"accuracy", "reason"}),
    ("learner", {"0", "4"}),
    ("loop", {"0", "1"}),
]


@pytest.mark.slow
def test_the_python_api_examples_run(tmp_path):
    """Every Python block of the page, one after the other in one folder: lines begin as they should. Each
    but the loop is short."""
    found = blocks(DOCS / "reference" / "python-api.md", "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for (name, beginnings), example in zip(API_EXAMPLES, found, strict=True):
        done = call([sys.executable, "-c", example], cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        printed = {line.split()[0] for line in done.stdout.splitlines()}
        assert printed and beginnings <= printed, f"{name}: {done.stdout}"
        lines = [line for line in example.splitlines() if line.strip()]
        assert len(lines) <= 18 or name == "loop", name


def test_every_page_is_in_the_navigation():
    config = re.sub(r"!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r": (\S+\.md)$", config, re.MULTILINE))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages <= listed


CODE = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("limbeck/**/*.py") if p.name != "recipe.py")
MODELS = [m for m in vars(recipe).values() if isinstance(m, type) and issubclass(m, recipe.Settings)]
FIELDS = [(m.__name__, field) for m in MODELS for field in m.model_fields if field in m.__annotations__]


@pytest.mark.parametrize(("model", "field"), FIELDS, ids=lambda word: word)
def test_settings_are_described_and_read(model, field):
    """No key without a word about it, and none without effect but a recipe's description."""
    info = getattr(recipe, model).model_fields[field]
    assert info.description or field in ("kind", "source")
    if field in ("description", "preset"):  # one is for people, the other is resolved as it is read
        return
    read = re.search(rf"\.{field}\b|[\"']{field}[\"']", CODE) is not None
    assert read, f"nobody reads {model}.{field}"


# ---------------------------------------------------------------- pages


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_generated_parts_are_up_to_date():
    done = call([sys.executable, ROOT / "docs" / "generate.py", "--check"])
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python docs/generate.py"


def test_no_loose_ends():
    loose = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|(?:\.\./|/work/)sha" + r"red\b")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        ours = not any(part in NOT_OURS or part.startswith(".") or "egg-info" in part for part in parts)
        if ours and path.is_file() and path.suffix in TEXT:
            found = loose.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found[0]}"
