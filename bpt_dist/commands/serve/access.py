"""Who may ask, and which folders may be loaded: the token, the name of the host, and the paths below the allowed root."""

from __future__ import annotations

import hmac
import ipaddress
import re
from pathlib import Path

from bpt_dist.commands.serve.limits import Refused
from bpt_dist.errors import ConfigError

LEAST_TOKEN, MOST_TOKEN = 16, 4096  # characters
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Token:
    """The secret of the server; nothing prints it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def read(cls, file: Path) -> Token:
        """Read the one line of a file. Raises ConfigError, in which nothing of the file is shown."""
        try:
            with file.open("rb") as opened:
                data = opened.read(MOST_TOKEN + 1).strip()
        except OSError as error:
            raise ConfigError(f"--token-file {file}: cannot be read ({error.strerror}); give another file") from error
        if not LEAST_TOKEN <= len(data) <= MOST_TOKEN or not re.fullmatch(rb"[!-~]+", data):
            raise ConfigError(
                f"--token-file {file}: is not one line of {LEAST_TOKEN} to {MOST_TOKEN} printable ASCII characters without blanks; "
                f"write one with `openssl rand -hex 32`"
            )
        return cls(data)

    def is_given_by(self, header: bytes) -> bool:
        """Return whether an `Authorization` header holds the token; how long that takes says nothing about it."""
        scheme, _, given = header.partition(b" ")
        return hmac.compare_digest(given.strip(), self._secret) and scheme.lower() == b"bearer"


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_local_name(host: bytes) -> bool:
    """Return whether a `Host` header means this machine: a page of the web that a browser shows cannot write that."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    try:
        return name == "localhost" or is_loopback(name)
    except ValueError:
        return False


def folder_below(root: Path, given: object) -> Path:
    """Return the folder that a client names below `root`, links followed. Raises Refused for one that is not there."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise Refused(422, "folder", 'name the export as {"folder": "path/below/the/root"}')
    root = root.resolve()
    try:
        folder = (root / given).resolve()
        inside, found = folder.is_relative_to(root), folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, half a surrogate pair
        inside, found = True, False
    shown = ascii(given[:60])
    if not inside or Path(given).is_absolute():
        raise Refused(403, "folder", f"folder {shown} leaves the root of the exports; give a path below it")
    if not found:
        raise Refused(404, "folder", f"folder {shown} is not below the root of the exports; put the export there first")
    return folder


def refuse_bad_name(name: str) -> None:
    """Raise Refused for a name that no task may have."""
    if not NAME.fullmatch(name):
        raise Refused(422, "name", f"task {name[:60]!a} is no name; use letters, digits, `_`, `.` and `-`, at most 100")
