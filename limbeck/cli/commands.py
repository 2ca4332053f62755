"""Every command. Help and mistakes are answered before torch is imported.

Exit codes: 0 done, 2 a mistake in what was asked, 4 a damaged artifact, 70 our bug, 75 stopped but resumable,
130 interrupted twice.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .options import RUNS, AsJson, Home
from .options import mistake as _mistake
from .options import open_store as _store
from .plan import SIGNS as _SIGNS
from .plan import cached_forecast, plan
from .plan import load_recipe as _load
from .plan import open_graph as _graph
from .provenance import recall, release, why
from .serve import serve

if TYPE_CHECKING:
    from ..pipeline.run import Run

app = typer.Typer(
    help="Take an open base model to a reasoning model of your own, and distil it into a small one.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, rich_markup_mode=None,
)  # fmt: skip

RecipeFile = Annotated[
    Path, typer.Argument(help="a recipe, for instance recipes/quickstart.yaml", show_default=False)
]
Overrides = Annotated[
    list[str], typer.Option("--set", help="change a setting: stages.zero.steps=30", show_default=False)
]
Auto = Annotated[bool, typer.Option("--auto", help="let each curate stage's policy decide instead of people")]


@app.command()
def run(
    recipe: RecipeFile,
    runs: Home = RUNS,
    set_: Overrides = [],  # noqa: B006
    auto: Auto = False,
    as_json: AsJson = False,
    right: Annotated[
        str | None,
        typer.Option(
            "--i-have-the-right",
            metavar="REASON",
            help="do what a teacher's terms forbid; recorded for ever",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Carry a recipe out; what is done already is not done again. Ctrl-C checkpoints and stops."""
    from ..pipeline.run import Run
    from .display import Events, Lines, Tree

    plain = os.environ.get("TERM") == "dumb" or os.environ.get("CI") or not sys.stderr.isatty()
    display = Events() if as_json else Lines() if plain else Tree()
    try:
        job = Run(_load(recipe, set_, auto), recipe.parent, runs, display, right)
        _stop_gently(job)
        page = job.carry_out(cached_forecast(job.graph))
    finally:
        if isinstance(display, Tree):
            display.close()
    if as_json:
        Events.emit("result", ok=True, report=str(page) if page else None)
    elif page:
        print(f"The report is at {page}")


app.command()(plan)


@app.command()
def status(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run's folder, for instance runs/quickstart")
    ],
    as_json: AsJson = False,
) -> None:
    """Where a run stands, and for whom it waits."""
    from ..pipeline.review import reviews

    recipe = run_folder / "recipe.yaml"
    if not recipe.exists():
        raise _mistake(f"{run_folder} is no run: it has no recipe.yaml; runs begin with `limbeck run`")
    graph = _graph(_load(recipe, [], False), recipe, run_folder.parent)
    rows = [
        {
            "stage": n.name,
            "kind": n.kind,
            "state": n.state,
            "artifact": n.artifact and n.artifact.folder.name,
            "seconds": n.artifact and n.artifact.manifest["seconds"],
            "waiting_rows": len(reviews.pending(n.queue)) if n.state == "asks" else 0,
        }
        for n in graph.nodes.values()
    ]

    def line(r: dict[str, Any]) -> str:
        ask = f"{r['waiting_rows']} rows wait for a person: limbeck curate {run_folder} {r['stage']}"
        return (
            f"{_SIGNS[r['state']]:10} {r['stage']:32} {ask if r['state'] == 'asks' else r['artifact'] or ''}"
        )

    _print(rows, as_json, line)


@app.command()
def show(
    artifact: Annotated[
        str,
        typer.Argument(
            help="the beginning of an artifact's name, or a model's directory or config.json; none lists all artifacts"
        ),
    ] = "",
    runs: Home = RUNS,
    as_json: AsJson = False,
    context: Annotated[
        int, typer.Option(min=1, help="tokens of context that a model's figures are for")
    ] = 4096,
) -> None:
    """List the artifacts, print one's manifest, or tell what a model takes: weights, FLOPs, cache, memory."""
    if Path(artifact).suffix == ".json" or (artifact and (Path(artifact) / "config.json").exists()):
        from ..model.config import ModelConfig
        from ..model.footprint import describe, tell

        config = ModelConfig.from_directory(Path(artifact))
        print(json.dumps(describe(config, context), indent=2) if as_json else tell(config, context))
        return
    store = _store(runs)
    if artifact:
        print(json.dumps(store.resolve(artifact).manifest, indent=2, ensure_ascii=False))
        return
    rows = [
        {
            "artifact": a.folder.name,
            "stage": a.manifest["stage"],
            "seconds": a.manifest["seconds"],
            "bytes": sum(o["bytes"] for o in a.manifest["outputs"].values()),
        }
        for a in store.all()
    ]
    _print(
        rows,
        as_json,
        lambda r: f"{r['artifact']:28} {r['stage']:28} {r['seconds']:8.1f} s {r['bytes'] / 1e6:9.2f} MB",
    )


app.command()(why)
app.command()(recall)
app.command()(release)
app.command()(serve)


@app.command()
def gc(runs: Home = RUNS, yes: Annotated[bool, typer.Option("--yes", help="really delete")] = False) -> None:
    """Delete artifacts that no run in the folder uses any more, and what killed stages left."""
    from ..types import Resumable

    store = _store(runs)
    used = {name for index in runs.glob("*/stages.json") for name in json.loads(index.read_text()).values()}
    unused = [a.folder for a in store.all() if a.folder.name not in used] + store.leftovers()
    for folder in unused:
        try:
            with store.lock(folder, patience=0):
                size = store.remove(folder) if yes else store.size(folder)
        except Resumable:
            print(f"kept {folder}: a stage is at work in it")
            continue
        print(f"{'deleted' if yes else 'would delete'} {folder} ({size / 1e6:.1f} MB)")
    if not unused:
        print("nothing to delete")


@app.command()
def verify(runs: Home = RUNS) -> None:
    """Hash every artifact again and compare with its manifest."""
    faults = 0
    for artifact, wrong in _store(runs).verify():
        faults += bool(wrong)
        print(f"{artifact.folder.name}: {'; '.join(wrong) if wrong else 'as it was'}")
    if faults:
        raise typer.Exit(4)


@app.command()
def curate(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run's folder, for instance runs/quickstart")
    ],
    stage: Annotated[str, typer.Argument(help="the curate stage that waits")],
    reviewer: Annotated[str, typer.Option(help="who reviews")] = os.environ.get("USER", "somebody"),
    second: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="let two people review this share of the rows", show_default=False),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="write the open rows to this JSONL file, to be filled in")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="take verdicts over from a JSONL file")
    ] = None,
) -> None:
    """Review the rows of a waiting stage: here at the terminal, or in a JSONL file (fields: verdict, completion)."""
    from ..pipeline.review import reviews
    from ..pipeline.review.curate import write_rows
    from .review import review_at_terminal

    queue = _queue(run_folder, stage)
    if second is not None:
        reviews.ask_twice(queue, second, reviewer)
        print(f"two people review {second:.0%} of the rows; {len(reviews.pending(queue))} rows are open")
    elif export:
        rows = reviews.export_rows(queue, reviewer)
        write_rows(export, rows)
        print(f"wrote {len(rows)} rows to {export}; set each verdict to accept, edit or reject")
    elif import_:
        taken = reviews.import_reviews(queue, import_, reviewer)
        print(f"took {taken} verdicts over; {len(reviews.pending(queue))} rows are still open")
    else:
        review_at_terminal(queue, reviewer)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or hf:OWNER/NAME (extra hub)")],
    models: Annotated[Path, typer.Option(help="where models are kept")] = Path("models"),
) -> None:
    """Fetch a base model and convert it to an HF directory."""
    from ..model.pull import pull as fetch

    print(fetch(name, models))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="a model directory, a model that was pulled, or the beginning of an artifact's name"
        ),
    ],
    gguf: Annotated[
        str, typer.Option("--gguf", metavar="TYPE", help="f32 is exact, f16 half its size, q8_0 a quarter")
    ] = "f16",
    out: Annotated[
        Path | None, typer.Option(help="the file to write; else MODEL-TYPE.gguf, here", show_default=False)
    ] = None,
    runs: Home = RUNS,
) -> None:
    """Write a model, tokenizer and chat template included, as one GGUF file for llama.cpp and what builds on it.

    Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V2 and V3 with a byte-level BPE tokenizer. The file appears
    whole or not at all. Run it with `llama-cli -m FILE` or `llama-server -m FILE`.
    """
    from ..model import gguf as ggml

    folder = _model(model, runs)
    path = out or Path(f"{folder.resolve().name}-{gguf}.gguf")
    ggml.write(folder / "model" if (folder / "model").is_dir() else folder, path, gguf)
    print(path)


@app.command()
def arena(
    runs: Home = RUNS,
    language: Annotated[
        str, typer.Option(help="questions in this language only: en, zh", show_default=False)
    ] = "",
    control: Annotated[
        str,
        typer.Option(
            help="leave out what answers gain by their length, or by their style", show_default=False
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="write people's preferences to this JSONL file instead, for reward and calibrate stages",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The arena's leaderboard: ratings from people's votes and, apart from them, from each judge's, with 95 % intervals."""
    from dataclasses import asdict

    from ..eval.arena_ratings import CONTROLS, rate
    from ..serve.votes import FILE, VoteStore

    folder = runs / ".studio"
    if not (folder / FILE).exists():
        raise _mistake(
            f"{folder / FILE} does not exist; nobody has voted there yet: the arena opens with `limbeck serve`"
        )
    if control not in CONTROLS:
        raise _mistake(f"--control {control}: choose {' or '.join(filter(None, CONTROLS))}")
    ballots = VoteStore(folder)
    if out:
        out.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ballots.preferences()),
            encoding="utf-8",
        )
        print(out)
        return
    votes = [vote for vote in ballots.votes() if language in ("", vote.language)]
    juries = {"": [vote for vote in votes if not vote.judge]}
    juries |= {
        judge: [v for v in votes if v.judge and v.voter == judge]
        for judge in sorted({v.voter for v in votes if v.judge})
    }
    rows = [
        {"judge": judge or None, **asdict(one)}
        for judge, cast in juries.items()
        for one in rate(cast, control).models
    ]
    _print(
        rows,
        as_json,
        lambda r: (
            f"{r['judge'] or 'people':16} {r['rank']:3} {r['model']:28} {r['rating']:6.0f} [{r['low']:.0f}, {r['high']:.0f}] "
            f"{r['votes']:6} votes {r['share']:5.0%}"
        ),
    )


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="time the compiled kernels anew, on a quiet machine")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and lacks, and what to do about it."""
    from dataclasses import asdict

    from .doctor import examine

    rows = [asdict(finding) for finding in examine(measure=measure)]
    signs = {True: "ok", False: "lacks", None: "note"}

    def line(row: dict[str, Any]) -> str:
        advice = [f"{'':7}-> {row['advice']}"] if row["advice"] else []
        table = [f"{'':7}{_timing(timing)}" for timing in row["table"]]
        return "\n".join([f"{signs[row['ok']]:6} {row['name']:22} {row['value']}", *advice, *table])

    _print(rows, as_json, line)


def _timing(row: dict[str, Any]) -> str:
    """One line of the table of kernels: an operation at one shape, ours beside torch's."""
    ours, torch = (f"{1e6 * row[side]:,.0f} us" for side in ("ours", "torch"))
    return f"{row['operation']:10} {row['shape']:40} ours {ours:>11}  torch {torch:>11}  used: {row['used']}"


@app.command()
def ask(
    model: Annotated[Path, typer.Argument(help="a model directory, or an artifact's folder")],
    question: Annotated[str, typer.Argument(help="what to ask")],
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: int = 0,
) -> None:
    """Ask a model a question and watch it think."""
    from .review import answer

    for piece in answer(model, question, temperature, max_new_tokens, seed):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    """The command line: a mistake is one sentence and an exit code, never a traceback."""
    try:
        app()
    except Exception as error:  # noqa: BLE001
        from ..types import LimbeckError  # brings numpy along, which --help can do without

        _fail(*(str(error), error.exit_code) if isinstance(error, LimbeckError) else _explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """What went wrong outside our rules: a full disk, a path that cannot be used, or our bug."""
    import tempfile
    import traceback

    from ..pipeline.store import out_of_space

    if out_of_space(error):
        where = getattr(error, "filename", None) or "the disk"
        return f"no space left on {where}; free some, and run the same command again", 75
    if isinstance(error, OSError) and error.filename and error.errno in _PATHS:
        return f"{error.filename}: {error.strerror}; give another path, or mend this one", 2
    with tempfile.NamedTemporaryFile("w", prefix="limbeck-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {error}; this is a bug of Limbeck, please report it with {file.name}", 70


def _fail(message: str, code: int) -> NoReturn:
    """One sentence on standard error; for programs the same as a result."""
    if "--json" in sys.argv:
        event = {"event": "result"} if "run" in sys.argv[1:2] else {}
        print(
            json.dumps(
                {"schema": 1, **event, "ok": False, "error": {"code": code, "message": message}},
                ensure_ascii=False,
            )
        )
    print(f"limbeck: {message}", file=sys.stderr)
    sys.exit(code)


_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def _model(name: str, runs: Path) -> Path:
    """A directory, here or under models/; or an artifact by the beginning of its name."""
    from ..model.find import find_model

    if (runs / "store").exists() and not Path(name).exists() and not (Path("models") / name).exists():
        return _store(runs).resolve(name).folder
    folder = find_model(name, Path())
    if folder.is_file():
        raise _mistake(f"{folder} is a GGUF file already; name a model directory")
    return folder


def _queue(run_folder: Path, stage: str) -> Path:
    recipe = run_folder / "recipe.yaml"
    if not recipe.exists():
        raise _mistake(f"{run_folder} is no run: it has no recipe.yaml; runs begin with `limbeck run`")
    node = _graph(_load(recipe, [], False), recipe, run_folder.parent).nodes.get(stage)
    if node is None or node.queue is None:
        raise _mistake(f"{stage} is not a stage of {run_folder} that waits for people")
    return node.queue


def _print(rows: list[dict[str, Any]], as_json: bool, line: Any) -> None:
    if as_json:
        print(json.dumps({"schema": 1, "ok": True, "data": rows}, ensure_ascii=False))
    else:
        for row in rows:
            print(line(row).rstrip())


def _stop_gently(job: Run) -> None:
    """First Ctrl-C: checkpoint and stop. Second: stop at once; the last checkpoint survives all the same.

    A handler may interrupt any line, so it prints nothing and takes no lock.
    """

    def handle(number: int, frame: Any) -> None:
        if job.stopping:
            job.host.kill()
            os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"")  # the tree hides the cursor
            os._exit(130)
        job.stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
