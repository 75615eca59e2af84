"""The routes: rows to answers, the tasks that are served, and what operators ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bpt_dist.artifacts.inference.exports import Export, read_exports
from bpt_dist.artifacts.inference.predictor import Answer, Predictor
from bpt_dist.commands.serve import described
from bpt_dist.commands.serve.access import Token, folder_below, refuse_bad_name
from bpt_dist.commands.serve.batching import Batcher, Closed, Full
from bpt_dist.commands.serve.front import GONE, Front, answer_of, failure, refusal_of
from bpt_dist.commands.serve.limits import SMALL_BODY, Limits, Refused, decode, problem_of, read_body, rows_of
from bpt_dist.commands.serve.metrics import Metrics
from bpt_dist.errors import UserError

STATUS = {None: 200, "row": 422, "fields": 422, "task": 404, "internal": 500}  # of the answer to a single row, by its kind


@dataclass
class Service:
    """A predictor behind a queue, and what its clients may do."""

    predictor: Predictor
    limits: Limits = field(default_factory=Limits)
    token: Token | None = None
    local_only: bool = True
    root: Path | None = None  # of the exports that clients may load
    wait_seconds: float = 0.005

    def __post_init__(self) -> None:
        prefixes = self.predictor.backbone.prefixes
        self.metrics = Metrics(lambda: self.batcher.num_waiting, lambda: len(self.predictor.tasks), prefixes)
        self.batcher = Batcher(
            self.predictor,
            wait_seconds=self.wait_seconds,
            tokens=self.predictor.tokens_at_once,
            most_waiting=self.limits.waiting_rows,
            observer=self.metrics,
        )

    async def answer(self, rows: Sequence[Any], request: Request) -> list[Answer]:
        """Return the answer to each row. Raises Refused where the queue is full, ClientDisconnect where nobody is left."""
        problems = [problem_of(row, self.limits) for row in rows]
        good = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
        found = iter(await self._result(self.batcher.submit(good), request) if good else ())
        return [next(found) if problem is None else problem for problem in problems]

    async def _result(self, future: Any, request: Request) -> Any:
        """Wait for a result of the computing thread, or give it up when the client is gone."""
        result, gone = asyncio.wrap_future(future), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            result.cancel()
            gone.cancel()

    async def load(self, name: str, body: Any) -> tuple[Export, bool]:
        """Serve the export of a folder under `name`; return it, and whether it replaces another. Raises Refused."""
        if self.root is None:
            raise Refused(403, "folder", "nothing can be loaded while this server runs; start it with --adapters ROOT")
        refuse_bad_name(name)
        if not isinstance(body, dict) or set(body) != {"folder"}:
            raise Refused(422, "folder", 'name the export as {"folder": "path/below/the/root"}')
        folder = folder_below(self.root, body["folder"])
        try:
            return await asyncio.wrap_future(self.batcher.call(partial(self._add, name, folder)))
        except UserError as error:
            message = str(error).replace(f"{self.root.resolve()}/", "").replace("give its own by --backbone PATH", "load it there")
            raise Refused(409, "export", message) from None

    def _add(self, name: str, folder: Path) -> tuple[Export, bool]:
        found = read_exports(folder)
        named = [export for export in found if export.name == name] or found
        if len(named) > 1:
            names = ", ".join(sorted(export.name for export in named))
            raise UserError(f"{folder}: has prompts for {names}; name one of these tasks, or the folder of one of them")
        export = Export(name, named[0].folder, named[0].record, named[0].task)
        replaced = name in self.predictor.tasks
        self.predictor.add(export, replace=True)
        return export, replaced


async def _disconnected(request: Request) -> None:
    """Return when the client is gone; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> Front:
    """Return the application of a service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title="bpt-dist serve", version=described.VERSION, description=described.TEXT, docs_url=None, redoc_url=None,
        lifespan=lifespan, redirect_slashes=False,
    )  # fmt: skip

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        """Answer by the error."""
        return refusal_of(error)

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        """Count a client that has left; nobody reads this."""
        service.metrics.abandoned.inc()
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        """Name a failure of ours; the front logs it."""
        return refusal_of(failure(error))

    @app.exception_handler(HTTPException)
    async def unknown(_request: Request, error: HTTPException) -> Response:
        """Give the framework's own refusals the form of ours."""
        what = {404: "there is nothing here; see /openapi.json", 405: "this method is not known here; see /openapi.json"}
        message = what.get(error.status_code, str(error.detail))
        return refusal_of(Refused(error.status_code, "route", message, error.headers or {}))

    @app.post("/predict", **described.PREDICT)
    async def predict(request: Request) -> Response:
        """Answer a row, or a list of rows of any tasks."""
        limits, metrics = service.limits, service.metrics
        value = decode(await read_body(request, limits, limits.body_bytes))
        rows = rows_of(value, limits)
        try:
            answers = await service.answer(rows, request)
        except Full as full:
            message = f"{limits.waiting_rows:,} rows wait already; try again in {full.retry_seconds:.0f} s"
            raise Refused(429, "full", message, {"retry-after": f"{full.retry_seconds:.0f}"}) from None
        except Closed:
            raise Refused(503, "closed", "the server stops or has failed; ask another one", {"connection": "close"}) from None
        metrics.rows.inc(len(rows))
        for answer in answers:
            if answer.error is not None:
                metrics.row_errors.labels(answer.kind).inc()
        if isinstance(value, list):
            return answer_of([answer.as_json() for answer in answers])
        return answer_of(answers[0].as_json(), STATUS[answers[0].kind])

    _add_tasks(app, service)
    _add_operations(app, service)
    return Front(app, service.metrics, service.token, local_only=service.local_only)


def _add_tasks(app: FastAPI, service: Service) -> None:
    @app.get("/tasks", **described.TASKS)
    async def tasks() -> Response:
        """List the tasks that are served."""
        served = sorted(service.predictor.tasks.items())
        return answer_of([described.task_of(export) for _, export in served])

    @app.get("/tasks/{name}", **described.TASK)
    async def task(name: str) -> Response:
        """Describe one task."""
        export = service.predictor.tasks.get(name)
        if export is None:
            raise Refused(404, "task", f"task {name[:60]!a} is not known here; see /tasks")
        return answer_of(described.task_of(export))

    @app.put("/tasks/{name}", **described.LOAD)
    async def load(name: str, request: Request) -> Response:
        """Serve an export below the root of the exports, in the place of an earlier one of that name."""
        body = decode(await read_body(request, service.limits, SMALL_BODY))
        export, replaced = await service.load(name, body)
        return answer_of(described.task_of(export), 200 if replaced else 201)

    @app.delete("/tasks/{name}", **described.REMOVE)
    async def remove(name: str) -> Response:
        """Serve a task no longer; rows that wait already are answered."""
        if service.root is None:
            raise Refused(403, "folder", "nothing can be removed while this server runs; start it with --adapters ROOT")
        try:
            await asyncio.wrap_future(service.batcher.call(partial(service.predictor.remove, name)))
        except UserError:
            raise Refused(404, "task", f"task {name[:60]!a} is not known here; see /tasks") from None
        return Response(status_code=204)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", **described.HEALTH)
    async def health() -> Response:
        """Say whether rows are answered."""
        alive = service.batcher.is_alive
        facts = {
            "status": "ok" if alive else "failed",
            "tasks": len(service.predictor.tasks),
            "waiting": service.batcher.num_waiting,
        }
        return answer_of(facts, 200 if alive else 503)

    @app.get("/metrics", **described.METRICS)
    async def metrics() -> Response:
        """Return all counters as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
