"""What `bpt-dist check --hostfile` runs on every host over ssh: lines of JSON on standard input and output.

1. in: variables, output marker, port      out: who this host is, its versions, where it listens
2. in: addresses of the other hosts        out: which of them could be connected to
3. in: the backbone                        out: its hash
It imports nothing that takes long, and ends with its standard input.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bpt_dist.distributed.environment import num_gpus
from bpt_dist.storage.provenance import versions

CONNECT_SECONDS = 5.0
LOOPBACK = "127.0.0.1"
GREETING = b"bpt-dist check\n"


def main() -> None:
    """Answer the three questions on standard input."""
    questions = (json.loads(line) for line in sys.stdin)
    opening = next(questions)
    os.environ.update(opening["variables"])
    address = gloo_address()
    with listen(address or LOOPBACK) as listener:
        answer({**facts(opening), "gloo": address, "port": listener.getsockname()[1]})
        for question in questions:
            if "peers" in question:
                answer({name: connection_error(address, port) for name, address, port in question["peers"]})
            else:
                answer({"backbone": hash_of_files(question["backbone"], question["revision"])})


def answer(facts: dict[str, Any]) -> None:
    """Write one line of JSON at once."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def facts(opening: dict[str, Any]) -> dict[str, Any]:
    """Return who this host is and what is installed on it."""
    marker, port = opening["marker"], opening["port"]
    return {
        "name": socket.gethostname(),
        "own_addresses": addresses_of(socket.gethostname()),
        "python": platform.python_version(),
        "packages": versions(),
        "sources": hash_of_sources(),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": num_gpus(),
        "marker": marker is None or Path(marker).is_file(),
        "port_in_use": port is not None and not can_bind(port),
        "master": first_address(),
        "variables": {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ},
    }


def gloo_address() -> str | None:
    """Return the address gloo gives to the other ranks: of its interface where one is named, else of this host's own name."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named is not None:
        return address_of_interface(named.split(",")[0])
    addresses = addresses_of(socket.gethostname())
    return addresses[0] if addresses else None


def address_of_interface(name: str) -> str | None:
    """Return the IPv4 address of a network interface, or None where there is no such interface or address."""
    import psutil

    return next((each.address for each in psutil.net_if_addrs().get(name, ()) if each.family == socket.AF_INET), None)


def addresses_of(name: str) -> list[str]:
    """Return the addresses a name resolves to here, none where it does not."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)))
    except OSError:
        return []


def first_address() -> str | None:
    """Return what the launcher takes as the master's address: the first that `hostname -I` prints."""
    printed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return printed[0] if printed else None


def can_bind(port: int) -> bool:
    """Return whether rank 0 could listen on `port`."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


def listen(address: str) -> socket.socket:
    """Greet every client of an ephemeral port of `address`, as a rank of gloo would listen there."""
    listener = socket.create_server((address, 0))

    def greet() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(GREETING)

    threading.Thread(target=greet, daemon=True).start()
    return listener


def connection_error(address: str, port: int) -> str | None:
    """Return why `address:port` cannot be reached from here, or None when its greeting arrived."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            greeting = connection.recv(len(GREETING))
    except OSError as error:
        return error.strerror or str(error)
    return None if greeting == GREETING else "another program answered"


def hash_of_sources() -> str:
    """Return the SHA-256 over names and bytes of this package's and the launcher's Python files."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in (package, package.parent / "launcher"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(package.parent)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def hash_of_files(path: str, revision: str | None) -> str | None:
    """Return the identity of a checkpoint, as `Backbone.identity` has it; None where a hub id is not in this host's cache."""
    files = list(_weights(path, revision))
    if None in files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with open(str(file), "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _weights(path: str, revision: str | None) -> Iterator[Path | None]:
    index = _cached(path, "model.safetensors.index.json", revision)
    names: Sequence[str] = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    yield from (_cached(path, name, revision) for name in names)


def _cached(path: str, name: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        file: Any = Path(path) / name
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, name, revision=revision)
        file = Path(cached) if isinstance(cached, str) else None
    return file if file is not None and file.is_file() else None


if __name__ == "__main__":
    main()
