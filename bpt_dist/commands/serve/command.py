"""`bpt-dist serve`: load the backbone and the prompts, bind the address, answer until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from uvicorn import Server

    from bpt_dist.commands.serve.limits import Limits

KEEP_ALIVE = 30  # seconds that a client may leave a connection idle


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the server is reached, and by whom."""

    host: str
    port: int
    token_file: Path | None
    adapters: Path | None


def serve(
    places: Sequence[Path],
    named: Sequence[str],
    place: Place,
    *,
    backbone: str | None,
    ensemble: bool,
    best: bool,
    wait_ms: float,
    tokens: int,
    prefix_bytes: int | None = None,
    sizes: dict[str, Any],
) -> None:
    """Serve the prompts until a signal; what was accepted by then is answered. Raises ConfigError for what cannot be used."""
    _refuse_without_packages()
    limits = _limits(sizes)
    from bpt_dist.artifacts.inference.exports import read_given
    from bpt_dist.commands.serve.access import Token, is_loopback

    exports = read_given(places, named, ensemble=ensemble, best=best)
    token = None if place.token_file is None else Token.read(place.token_file)
    if place.adapters is not None and not place.adapters.is_dir():
        raise ConfigError(f"--adapters {place.adapters}: there is no such folder; give the one that holds exports to be loaded")
    listener = _bound(place.host, place.port)
    address, port = listener.getsockname()[:2]
    local = is_loopback(address)
    if not local and token is None:
        listener.close()
        raise ConfigError(f"--host {place.host}: is reached by other machines; give a --token-file, or leave --host out")
    # Once the cheap mistakes are out: the backbone takes seconds.
    from bpt_dist.artifacts.inference.backbone import load_backbone
    from bpt_dist.artifacts.inference.predictor import Predictor
    from bpt_dist.commands.serve.app import Service, make_app

    if sys.stderr.isatty():
        typer.echo("loading the backbone ...", err=True)
    loaded = load_backbone(exports[0], backbone)
    predictor = Predictor(loaded, exports, tokens_at_once=tokens, prefix_bytes=prefix_bytes)
    service = Service(predictor, limits, token, local_only=local, root=place.adapters, wait_seconds=wait_ms / 1000)
    # uvicorn raises a signal again once it has stopped; by then all is answered, and the exit code is 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)
    server = server_of(make_app(service), limits)
    listener.listen(server.config.backlog)
    tasks = "1 task" if len(exports) == 1 else f"{len(exports)} tasks"
    typer.echo(f"{tasks} at http://{_shown(address)}:{port}; Ctrl-C or SIGTERM ends it")
    server.run(sockets=[listener])


def _limits(sizes: dict[str, Any]) -> Limits:
    from bpt_dist.commands.serve.limits import Limits

    limits = Limits(**sizes)
    if limits.rows > limits.waiting_rows:
        raise ConfigError(
            f"--max-rows {limits.rows}: such a request never fits into a queue of {limits.waiting_rows} rows; raise --max-waiting"
        )
    return limits


def server_of(app: Any, limits: Limits) -> Server:
    """Return the HTTP server of an application."""
    import uvicorn

    from bpt_dist.commands.serve.front import PatientProtocol
    from bpt_dist.commands.serve.limits import CONNECTIONS

    PatientProtocol.head_seconds = limits.head_seconds
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", loop="asyncio", lifespan="on", log_config=None, log_level="error",
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE, limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
    )  # fmt: skip
    return uvicorn.Server(config)


def _refuse_without_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"bpt-dist serve: {', '.join(missing)} is not installed; run `pip install 'bpt_dist[serve]'`")


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, so that a port in use is known before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host}: is no address of this machine ({error}); give 127.0.0.1, or another of its own"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        remedy = "give another --port, or 0 for a free one"
        raise ConfigError(f"--host {host} --port {port}: cannot be bound ({error.strerror}); {remedy}") from error
    return listener


def _shown(address: str) -> str:
    return f"[{address}]" if ":" in address else address
