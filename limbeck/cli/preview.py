"""The command `limbeck try`, which shows prompts of a recipe's stages as the model sees them, with its
answers and their verdicts, before anything is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    RUNS,
    AsJson,
    Device,
    Home,
    find_recipe,
    hold_device,
    load_recipe,
    open_graph,
    print_json,
    usage_error,
)
from .run import Overrides, RecipeFile

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from ..pipeline.graph import Graph, Node
    from ..pipeline.preview import Preview

SPECIAL = r"<[^<>\s]{1,40}>"  # special tokens of chat templates, such as <|im_start|> or <think>
MAX_TEXT = 600  # characters of an answer that are shown
MAX_ANSWER = 80  # characters of an extracted answer

app = typer.Typer()


@app.command("try")
def try_recipe(
    recipe: RecipeFile,
    stage: Annotated[
        str, typer.Option(help="only this stage; evaluations and remote models are asked by name only")
    ] = "",
    prompts: Annotated[int, typer.Option(min=1, help="problems that are asked")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="answers to each problem")] = 4,
    runs: Home = RUNS,
    device: Device = "cpu",
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show prompts as the model sees them, its answers and their verdicts, before anything is learned."""
    import tempfile

    from ..pipeline import preview

    path = find_recipe(recipe)
    graph = open_graph(load_recipe(path, set_, False), path, runs)
    previews: list[Preview] = []
    missing: list[dict[str, str]] = []
    with (
        tempfile.TemporaryDirectory(prefix="limbeck-try-") as scratch,
        hold_device(device, f"limbeck try {recipe}") as name,
    ):
        for node in preview.nodes_to_try(graph, stage):
            found = preview.try_node(graph, node, Path(scratch), prompts, samples, name)
            if not found:
                missing.append({"stage": node.name, "remedy": _remedy(graph, node)})
                continue
            previews.append(found)
            if not as_json:
                show(found)
    if not previews:
        raise usage_error(f"{path}: nothing can be tried yet: {missing[0]['stage']} {missing[0]['remedy']}")
    if as_json:
        print_json({"previews": previews, "missing": missing})
        return
    for entry in missing:
        print(f"{entry['stage']} {entry['remedy']}")


def _remedy(graph: Graph, node: Node) -> str:
    """Return the end of a sentence that tells why a stage cannot be previewed, and what to do."""
    pretrained = [
        name for name, other in graph.nodes.items() if other.kind == "pretrain" and not other.artifact
    ]
    return f"needs a model that is not made yet; `limbeck run` makes {', '.join(pretrained)} first"


# ---------------------------------------------------------------- on the terminal


def show(preview: Preview) -> None:
    """Print a preview on standard output: prompts, answers with verdicts, the counts and the remedies."""
    from rich.console import Console

    console = Console(highlight=False)
    for part in _parts(preview):
        console.print(part)


def _parts(preview: Preview) -> Iterator[RenderableType]:
    """Yield the parts of a preview in the order in which they are printed."""
    from rich.rule import Rule
    from rich.text import Text

    from ..report.preview import remedies, summary

    yield Rule(Text(preview["stage"], "bold"), align="left", style="dim")
    yield _origin(preview)
    allowed = preview["sampling"]["max_new_tokens"]
    for prompt in preview["prompts"]:
        yield from _prompt(prompt, allowed)
    yield Text()
    yield Text(summary(preview).en)
    for remedy in remedies(preview):
        yield Text(f"! {remedy.en}", "yellow")
    yield Text()


def _origin(preview: Preview) -> Text:
    """Return the line that names the model and the sampling parameters."""
    from rich.text import Text

    sampling = preview["sampling"]
    wanted = preview.get("wanted")
    model = preview["model"]
    if wanted:
        model = f"{model}, which stands in for {wanted}: that is not made yet"
    parameters = f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
    return Text(f"{parameters}, at most {sampling['max_new_tokens']} tokens, from {model}", "dim")


def _prompt(prompt: dict[str, Any], allowed: int) -> Iterator[RenderableType]:
    """Yield a problem: its rendered prompt in a frame, then its answers, the first one with its text.
    `allowed` is the largest number of tokens of an answer."""
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    title = f"{prompt['problem']} · {prompt['prompt_tokens']} tokens"
    yield Panel(_marked(prompt["prompt"]), title=title, title_align="left", border_style="dim")
    for place, answer in enumerate(prompt["answers"]):
        if place == 0:
            text = answer["text"]
            shown = _marked(text[:MAX_TEXT])
            if len(text) > MAX_TEXT:
                shown.append(f" … {len(text) - MAX_TEXT} more characters", "dim")
            yield Padding(shown, (0, 0, 0, 2))
        yield _verdict(answer, prompt["gold"], allowed)
    yield Text()


def _verdict(answer: dict[str, Any], gold: str | None, allowed: int) -> Text:
    """Return the line of one answer: the verdict, the extracted answer, the gold answer, the tokens, the
    reason."""
    from rich.text import Text

    from .display import printable

    line = Text("✓ right" if answer["right"] else "✗ wrong", "green" if answer["right"] else "red")
    extracted = printable(answer["answer"])[:MAX_ANSWER] or "none found"
    words = [f"answer: {extracted}"]
    if gold is not None:
        words.append(f"gold: {printable(gold)[:MAX_ANSWER]}")
    words.append(f"{answer['tokens']} of {allowed} tokens")
    if answer["reason"]:
        words.append(printable(answer["reason"]))
    return line.append(f" · {' · '.join(words)}", "default")


def _marked(text: str) -> Text:
    """Return the text without control characters, with its special tokens coloured."""
    from rich.text import Text

    from .display import printable

    marked = Text(printable(text))
    marked.highlight_regex(SPECIAL, "cyan")
    return marked
