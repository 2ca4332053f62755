"""The command that serves models: an API that OpenAI's clients speak, and the studio, at one address."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import RUNS, Home, mistake


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="a model directory, a pulled name, a GGUF file, an artifact, or a run, of which r1 is served",
        ),
    ] = None,
    runs: Home = RUNS,
    host: Annotated[
        str, typer.Option(help="the address to listen at; beyond this machine a key is required")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    key: Annotated[
        str,
        typer.Option(envvar="LIMBECK_KEY", help="what clients must show; the environment hides it from `ps`"),
    ] = "",
    allow_host: Annotated[
        list[str], typer.Option(help="another name that this server goes by", show_default=False)
    ] = [],  # noqa: B006
    price: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]READ/SAID",
            help="per million tokens; answers then tell their cost",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    rows: Annotated[
        int, typer.Option(min=1, max=4096, help="how many answers of a model are said at once")
    ] = 64,
    queue: Annotated[int, typer.Option(min=1, help="how many requests may wait for one")] = 256,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="how long an answer may get where a request does not say")
    ] = 2048,
    threads: Annotated[int, typer.Option(min=0, help="processor threads; 0 takes all")] = 0,
    drain: Annotated[
        float,
        typer.Option(min=0, help="seconds that running answers are given when the server is told to stop"),
    ] = 30.0,
) -> None:
    """Serve models: an OpenAI-compatible API under /v1, and the studio. Without a model, the studio alone."""
    if not key and not _loopback(host):
        raise mistake(
            f"--host {host} can be reached from elsewhere; give a key with --key or LIMBECK_KEY, or listen at 127.0.0.1"
        )
    from ..runtime import allocator

    allocator.keep_memory()
    from ..serve.app import build
    from ..serve.models import open_service
    from ..serve.server import claim
    from ..serve.server import serve as answer

    address = claim(host, port)
    service = open_service(models or [], runs, price, rows, queue, max_tokens, threads)
    app = build(runs, service, key or None, frozenset(name.lower() for name in (*allow_host, host)))
    shown = f"[{host}]" if ":" in host else host
    print(
        f"http://{shown}:{address.getsockname()[1]} serves {', '.join(service.models) or 'the studio'}; the API is under /v1",
        flush=True,
    )
    answer(app, address, drain)


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
