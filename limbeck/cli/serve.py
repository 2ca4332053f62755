"""The command `limbeck serve`, which serves models by an OpenAI-compatible API and the studio (the web
pages), at one address.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

import typer

from .options import MODEL, RUNS, Device, Home, hold_device, tell, usage_error

app = typer.Typer()

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]MODEL...",
        help=MODEL,
    ),
]
Host = Annotated[str, typer.Option(help="the address to listen at; beyond this machine a key is required")]
Port = Annotated[int, typer.Option(min=0, max=65535)]
Key = Annotated[
    str,
    typer.Option(envvar="LIMBECK_KEY", help="what clients must show; the environment hides it from `ps`"),
]
AllowedHosts = Annotated[
    list[str], typer.Option(help="another name that this server goes by", show_default=False)
]
Prices = Annotated[
    list[str],
    typer.Option(
        metavar="[NAME=]READ/SAID",
        help="per million tokens; answers then tell their cost",
        show_default=False,
    ),
]
MaxRows = Annotated[int, typer.Option(min=1, max=4096, help="how many answers of a model are said at once")]
MaxQueue = Annotated[int, typer.Option(min=1, help="how many requests may wait for one")]
MaxTokens = Annotated[
    int, typer.Option(min=1, help="how long an answer may get where a request does not say")
]
Threads = Annotated[int, typer.Option(min=0, help="processor threads; 0 takes all")]
Drain = Annotated[
    float,
    typer.Option(min=0, help="seconds that running answers are given when the server is told to stop"),
]


@app.command()
def serve(
    models: Models = None,
    runs: Home = RUNS,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    key: Key = "",
    allow_host: AllowedHosts = [],  # noqa: B006
    price: Prices = [],  # noqa: B006
    rows: MaxRows = 64,
    queue: MaxQueue = 256,
    max_tokens: MaxTokens = 2048,
    threads: Threads = 0,
    device: Device = "cpu",
    drain: Drain = 30.0,
) -> None:
    """Serve models: an OpenAI-compatible API under /v1, and the studio. Without a model, the studio alone.

    For instance: `limbeck serve quickstart/zero quickstart/r1`, `limbeck serve mine=model.gguf`
    """
    if not key and not _is_loopback(host):
        raise usage_error(
            f"--host {host} can be reached from elsewhere; give a key with --key or LIMBECK_KEY, "
            "or listen at 127.0.0.1"
        )
    names = models or []
    if device != "cpu" and not names:
        raise usage_error(
            f"--device {device}: the studio alone computes nothing; name a model, or leave it out"
        )
    from ..runtime import allocator

    allocator.keep_memory()  # before torch allocates any
    from ..serve.app import build
    from ..serve.models import open_service
    from ..serve.server import claim
    from ..serve.server import serve as run_server

    address = claim(host, port)
    with hold_device(device, f"limbeck serve {' '.join(names)}") as held:
        service = open_service(names, runs, price, rows, queue, max_tokens, threads, held)
        for sentence in service.unavailable.values():
            tell(sentence)
        host_names = frozenset(name.lower() for name in (*allow_host, host))
        application = build(runs, service, key or None, host_names)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{address.getsockname()[1]}"
        served = ", ".join(service.models) or "the studio"
        print(f"{url} serves {served}; the API is under /v1", flush=True)
        run_server(application, address, service.engine_thread, drain)


def _is_loopback(host: str) -> bool:
    """Return True if `host` is an address that only this machine can reach: localhost or a loopback IP
    address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
