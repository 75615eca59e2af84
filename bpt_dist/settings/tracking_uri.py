"""Which tracking addresses are accepted."""

from __future__ import annotations

from urllib.parse import urlsplit

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


def problem_with_uri(uri: str, allow_insecure: bool) -> str | None:
    """Return what is wrong with an MLflow store address, or None.

    Every process must reach the same store, so sqlite needs an absolute path; a password in the address would
    end up in the run record, so credentials belong in MLflow's own variables or a file.
    """
    try:
        parts = urlsplit(uri)
        host, credentials = parts.hostname, parts.username is not None or parts.password is not None
    except ValueError:
        return f"is not an address (got {uri!r}); write sqlite:////absolute/path.db or https://HOST:PORT"
    if credentials:
        return "holds credentials (value withheld); remove them from the address"
    if parts.scheme == "sqlite":
        absolute = uri.startswith("sqlite:////")
        return None if absolute else f"needs an absolute path (got {uri!r}); write sqlite:////absolute/path.db"
    if parts.scheme not in {"http", "https"} or not host:
        return f"is neither sqlite nor http(s) (got {uri!r}); write sqlite:////absolute/path.db or https://HOST:PORT"
    if parts.scheme == "http" and host not in LOCAL_HOSTS and not allow_insecure:
        return f"is plain http to another host (got {uri!r}); use https or set tracking.allow_insecure: true"
    return None
