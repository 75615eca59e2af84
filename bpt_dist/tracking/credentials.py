"""MLflow's own file for user and password, or token."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

from bpt_dist.distributed.environment import home_folder
from bpt_dist.errors import ConfigError

KEYS = ("mlflow_tracking_username", "mlflow_tracking_password", "mlflow_tracking_token")


def credentials(file: Path | None = None) -> dict[str, str]:
    """Return MLflow's variables for user and password, or token, from its own file `~/.mlflow/credentials`; empty without one.

    They are set in the process that talks to the server and nowhere else, so no launcher can pass them on or print them. Raises
    ConfigError for a file that others can read.
    """
    home = home_folder()
    path = file or (home / ".mlflow" / "credentials" if home is not None else None)
    if path is None or not path.is_file():
        return {}
    facts = path.stat()
    if facts.st_mode & 0o077 or facts.st_uid != os.getuid():
        raise ConfigError(f"{path}: can be read by others (mode {facts.st_mode & 0o777:o}); chmod 600 {path}")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:  # neither message may quote the file
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); write [mlflow] and KEY = VALUE lines") from None
    section = parser["mlflow"] if parser.has_section("mlflow") else {}
    return {key.upper(): section[key] for key in KEYS if key in section}
