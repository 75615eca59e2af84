"""What a tracking store answers: whether it takes what a run will send, and the remedy where it does not.

A store that is silent is asked again. One that answers and refuses goes on refusing until somebody acts, so that is said at once.
It is asked without MLflow, whose import takes seconds, in the way of MLflow's client: the same library, so the same proxies,
certificates and credentials.
"""

from __future__ import annotations

import base64
import logging
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import experiment_of, notes
from bpt_dist.errors import StorageError, UserError
from bpt_dist.tracking.credentials import credentials
from bpt_dist.tracking.places import sqlite_path, store_uri

if TYPE_CHECKING:
    import requests

CONNECT_SECONDS, ANSWER_SECONDS = 2.0, 2.5
SQLITE_SECONDS = 3
LONGEST_QUOTE = 200
BY_NAME = "/api/2.0/mlflow/experiments/get-by-name"
SIGNED_BY_MLFLOW = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
UNAUTHENTICATED, FORBIDDEN, NOT_FOUND, PROXY_ASKS, TOO_MANY, SERVER_ERROR = 401, 403, 404, 407, 429, 500
log = logging.getLogger(__name__)


class Silent(OSError):
    """Nobody answers at the address of a store, or the server has an error: it is asked again later."""


class Refused(StorageError):
    """The store answers and does not take what is sent; the message ends in the remedy."""


def ask(uri: str, experiment: str) -> str:
    """Return where a store that takes runs of `experiment` answers.

    Raises Refused, Silent, or ConfigError for a credentials file that others can read.
    """
    store = sqlite_path(uri)
    if store is None:
        return _ask_server(uri.rstrip("/"), experiment)
    if store.is_file():
        _ask_database(store, experiment)
        return f"{store} can be read"
    return f"{store} will be made by the first run"


def explain(error: Exception, uri: str, experiment: str) -> str:
    """Return what an error of the store means, with the remedy; any error that talking to it raises."""
    if isinstance(error, UserError | Silent):
        return str(error)
    status = getattr(error, "get_http_status_code", lambda: None)()
    words = str(error).splitlines()[0][:LONGEST_QUOTE] if str(error) else ""
    if sqlite_path(uri) is None and status is not None and (text := _refusal(status, uri, experiment, words)):
        return text
    if isinstance(error, OSError):
        return f"{uri}: {type(error).__name__}: {words}; start the server"
    return f"{uri}: {type(error).__name__}: {words}; correct what it names"


def is_refusal(error: Exception, uri: str, experiment: str) -> bool:
    """Return whether an error is an answer of the store, or a fault here, which the next try will not change."""
    if isinstance(error, UserError):
        return True
    status = getattr(error, "get_http_status_code", lambda: None)()
    return sqlite_path(uri) is None and status is not None and _refusal(status, uri, experiment, "") is not None


def warn_of_refusals(configs: Iterable[RunConfig]) -> None:
    """Say before the first of several runs what is wrong with their stores; they train without them."""
    stores = {(store_uri(config), experiment_of(config)): config for config in configs if config.tracking.mlflow}
    for text in dict.fromkeys(note for config in stores.values() for note in notes(config)):
        log.warning("tracking: %s", text)
    for uri, experiment in stores:
        try:
            ask(uri, experiment)
        except (UserError, Silent) as error:
            log.warning("tracking: %s; the runs go on without it", error)


def deleted_experiment(experiment: str, number: object, uri: str) -> Refused:
    """Return the refusal of an experiment that was deleted in the MLflow page."""
    return Refused(
        f"tracking.experiment: {experiment!r} was deleted in {uri}; restore it with `MLFLOW_TRACKING_URI={uri} mlflow experiments "
        f"restore --experiment-id {number}`, or give new runs another tracking.experiment"
    )


def deleted_run(run_id: str, folder: Path, uri: str) -> Refused:
    """Return the refusal of a run that was deleted in the MLflow page."""
    return Refused(
        f"{folder}: its MLflow run was deleted in {uri}; restore it with `MLFLOW_TRACKING_URI={uri} mlflow runs restore "
        f"--run-id {run_id}`, or set tracking.mlflow=false"
    )


def _ask_database(store: Path, experiment: str) -> None:
    uri = f"sqlite:///{store}"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(store))}?mode=ro", uri=True, timeout=SQLITE_SECONDS)) as database:
            database.execute("SELECT version_num FROM alembic_version").fetchone()
            query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
            found = database.execute(query, (experiment,)).fetchone()
    except sqlite3.Error as error:
        raise Refused(f"{store}: {error}; move it away (a new one is made) or give another tracking.uri") from error
    if found is not None and found[1] == "deleted":
        raise deleted_experiment(experiment, found[0], uri)


def _ask_server(uri: str, experiment: str) -> str:
    import requests

    url, options = f"{uri}{BY_NAME}", _request_options()
    proxy = _proxy(url)
    through = f" through the proxy {proxy}" if proxy else ""
    place = f"{urlsplit(uri).netloc}{through}"
    try:
        answer = requests.get(url, {"experiment_name": experiment}, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)
    except requests.exceptions.SSLError as error:
        if "CERTIFICATE" not in str(error):
            raise Refused(f"{uri}: does not speak https ({_reason(error)}); correct the port, or write http://") from error
        raise Refused(
            f"{uri}: its certificate is not accepted ({_reason(error)}); name that of its authority in "
            "MLFLOW_TRACKING_SERVER_CERT_PATH"
        ) from error
    except requests.RequestException as error:
        text = str(error)
        if proxy and "407" in text:
            raise Refused(_proxy_asks(proxy)) from error
        remedy = "correct http_proxy and https_proxy, or name the host in no_proxy" if proxy else "start the server"
        raise Silent(f"nobody answers at {uri}{through} ({_reason(error)}); {remedy}") from error
    except ValueError as error:  # an address that no request can be made of
        raise Refused(f"tracking.uri: {error} (got {uri!r}); correct it") from error
    return _judged(answer, uri, experiment, place, proxy)


def _judged(answer: requests.Response, uri: str, experiment: str, place: str, proxy: str | None) -> str:
    """Return where the store answers; raises what the answer of a server means."""
    body = _json(answer)
    if answer.ok and isinstance(body.get("experiment"), dict):
        found = body["experiment"]
        if found.get("lifecycle_stage") == "deleted":
            raise deleted_experiment(experiment, found.get("experiment_id"), uri)
        return f"{place} answers"
    if answer.status_code == NOT_FOUND and body.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return f"{place} answers"  # the first run makes the experiment
    if answer.status_code == PROXY_ASKS:
        raise Refused(_proxy_asks(proxy or place))
    if answer.status_code in (UNAUTHENTICATED, FORBIDDEN) and any(os.environ.get(name) for name in SIGNED_BY_MLFLOW):
        return f"{place} answers; whether it takes the credentials of MLFLOW_TRACKING_AUTH, MLflow finds out"
    words = str(body.get("message") or answer.text.strip().partition("\n")[0])[:LONGEST_QUOTE]
    if answer.ok:
        raise Refused(f"{uri}: answers, but not as MLflow does; give the address of the server as tracking.uri")
    if (text := _refusal(answer.status_code, uri, experiment, words)) is not None:
        raise Refused(text)
    raise Silent(f"{uri}: answers with error {answer.status_code} ({words}); look into the log of the server")


def _refusal(status: int, uri: str, experiment: str, words: str) -> str | None:
    """Return what a status of HTTP means with its remedy, None where asking again may help."""
    if status == UNAUTHENTICATED:
        file = Path("~/.mlflow/credentials")
        known = "are not accepted; correct them in" if _is_identified() else "are missing; write them to"
        return f"{uri}: user name and password, or a token, {known} {file}, mode 0600 (answer 401: {words})"
    if status == FORBIDDEN and "host" in words.lower():
        return f"{uri}: the server does not serve this host name; start it with --allowed-hosts (answer 403: {words})"
    if status == FORBIDDEN:
        return (
            f"{uri}: this user may not write to experiment {experiment!r}; ask for the right, or give another tracking.experiment "
            f"(answer 403: {words})"
        )
    if status == NOT_FOUND:
        return f"{uri}: there is no MLflow at this address; correct host and path of tracking.uri (answer 404: {words})"
    if status == TOO_MANY or status >= SERVER_ERROR:
        return None
    return f"{uri}: does not take what is sent; correct what the answer names (answer {status}: {words})"


def _request_options() -> dict[str, Any]:
    """Return credentials and certificates as MLflow's client sends them."""
    known, options = os.environ | credentials(), dict[str, Any]()
    user, password = known.get("MLFLOW_TRACKING_USERNAME"), known.get("MLFLOW_TRACKING_PASSWORD")
    token = known.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        options["headers"] = {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    elif token:
        options["headers"] = {"Authorization": f"Bearer {token}"}
    if known.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        options["verify"] = False
    elif known.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        options["verify"] = known["MLFLOW_TRACKING_SERVER_CERT_PATH"]
    if known.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        options["cert"] = known["MLFLOW_TRACKING_CLIENT_CERT_PATH"]
    return options


def _is_identified() -> bool:
    known = os.environ | credentials()
    return bool(known.get("MLFLOW_TRACKING_TOKEN") or known.get("MLFLOW_TRACKING_PASSWORD"))


def _proxy(url: str) -> str | None:
    """Return the proxy for an address, without its password, None where the connection is direct."""
    from requests.utils import get_environ_proxies, select_proxy

    found = select_proxy(url, get_environ_proxies(url))
    return None if not found else urlsplit(found if "//" in found else f"//{found}").netloc.rpartition("@")[2]


def _proxy_asks(proxy: str) -> str:
    return f"http_proxy: the proxy {proxy} wants a user and a password (answer 407); write them into http_proxy and https_proxy"


def _json(answer: requests.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _reason(error: Exception) -> str:
    """Return the innermost cause of a failed request: the outer ones repeat the address."""
    import requests

    cause: Any = error
    while nested := [each for each in (getattr(cause, "reason", None), *cause.args) if isinstance(each, Exception)]:
        cause = nested[0]
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return str(cause).rpartition(": ")[2][:LONGEST_QUOTE] or type(cause).__name__
