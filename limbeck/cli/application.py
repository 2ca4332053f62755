"""The application `limbeck`: its commands, `--version`, and the exit code of an error.

Help and usage errors are answered before torch is imported.

Exit codes: 0 done, 2 usage error, 4 damaged artifact, 70 bug of Limbeck, 75 stopped and resumable,
130 interrupted twice.
"""

from __future__ import annotations

import errno
import json
import sys
from typing import Annotated, NoReturn

import typer

from . import (
    arena,
    ask,
    compare,
    curate,
    evaluation,
    init,
    iterate,
    machine,
    models,
    plan,
    preview,
    provenance,
    results,
    run,
    serve,
    store,
    watch,
)

BUG = 70  # exit code: EX_SOFTWARE of sysexits.h
RESUMABLE = 75  # exit code: EX_TEMPFAIL of sysexits.h
USAGE_ERROR = 2  # exit code
_PATH_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}

app = typer.Typer(
    help="Take an open base model to a reasoning model of your own, and distil it into a small one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)
for module in (
    init,
    run,
    iterate,
    watch,
    preview,
    plan,
    models,
    provenance,
    serve,
    store,
    curate,
    arena,
    machine,
    ask,
    evaluation,
    results,
    compare,
):
    app.add_typer(module.app)


def _print_version(wanted: bool) -> None:
    """Print the installed version and exit, if `wanted` is True (the option `--version` was given)."""
    if wanted:
        from importlib.metadata import version

        print(f"limbeck {version('limbeck')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of `limbeck` itself; the application's help stands in `app`."""


def main() -> None:
    """Run the command line.

    An error is printed as one sentence without a traceback, and sets the exit code.
    """
    try:
        app()
    except Exception as error:  # noqa: BLE001
        from ..types import LimbeckError  # imports numpy, which --help does not need

        if isinstance(error, LimbeckError):
            _fail(str(error), error.exit_code)
        _fail(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for an exception that is not a LimbeckError: a full disk, an
    unusable path, or a bug of Limbeck.
    """
    from ..pipeline.store import out_of_space

    if out_of_space(error):
        where = getattr(error, "filename", None) or "the disk"
        return f"no space left on {where}; free some, and run the same command again", RESUMABLE
    if isinstance(error, OSError) and error.filename and error.errno in _PATH_ERRORS:
        return f"{error.filename}: {error.strerror}; give another path, or mend this one", USAGE_ERROR
    path = _save_traceback(error)
    return f"{type(error).__name__}: {error}; this is a bug of Limbeck, please report it with {path}", BUG


def _save_traceback(error: Exception) -> str:
    """Write the traceback of `error` to a temporary file and return the file's path."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="limbeck-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _fail(message: str, code: int) -> NoReturn:
    """Print the message on standard error and exit with `code`.

    With `--json` on the command line, the message is also printed as a JSON result on standard output.
    """
    if "--json" in sys.argv:
        event = {"event": "result"} if "run" in sys.argv[1:2] else {}
        error = {"code": code, "message": message}
        print(json.dumps({"schema": 1, **event, "ok": False, "error": error}, ensure_ascii=False))
    print(f"limbeck: {message}", file=sys.stderr)
    sys.exit(code)
