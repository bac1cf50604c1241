"""The routes of the workbench: messages in, messages out; what goes wrong is one sentence.

The model never runs here: routes hand it tasks through its worker and wait. `create` is the whole application, guard
included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.types import ASGIApp

import pellucid
from pellucid.errors import PellucidError
from pellucid.views.hosts import page as views_page
from pellucid.workbench import shell
from pellucid.workbench.chat import Tell, streamed
from pellucid.workbench.edits import check
from pellucid.workbench.guard import Door, Guard
from pellucid.workbench.hub import Hub
from pellucid.workbench.jobs import Jobs
from pellucid.workbench.messages import (
    ChatEnd,
    ChatRequest,
    EditRequest,
    JobRequest,
    LiveRequest,
    Models,
    PageRequest,
    Started,
    ViewRequest,
    Workspace,
    Workspaces,
    read,
)
from pellucid.workbench.messages import Jobs as JobList
from pellucid.workbench.notebook import notebook
from pellucid.workbench.panels import draw
from pellucid.workbench.replies import attachment, problem, reply
from pellucid.workbench.worker import LIVE, VIEW, Superseded, Task
from pellucid.workbench.workspaces import Folder

DETAILS = "the terminal of the workbench has the details"


def create(hub: Hub, door: Door, folder: Path) -> ASGIApp:
    """The application: `hub` has the models, `door` says who may come in, `folder` holds the workspaces."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        hub.close()

    app = FastAPI(lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None)
    _errors(app)

    @app.get("/")
    async def page() -> Response:
        made = HTMLResponse(shell.page(door.token))
        made.set_cookie(door.cookie, door.token, httponly=True, samesite="strict", path="/")
        return made

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        try:
            content, kind = shell.static(name)
        except PellucidError as error:
            return problem(404, str(error))
        return Response(content, media_type=kind)

    @app.get("/api/models")
    async def models() -> Response:
        return reply(Models(models=[each.card for each in hub.models.values()], version=pellucid.__version__))

    @app.post("/api/live")
    async def live(request: Request) -> Response:
        asked = read(await request.body(), LiveRequest)
        opened = hub.of(asked.model)
        task = Task(LIVE, asked.tab, partial(opened.live.reply, asked), key=("live", asked.tab, asked.pane))
        return reply(await asyncio.wrap_future(opened.worker.submit(task)))

    @app.post("/api/edit")
    async def edit(request: Request) -> Response:
        asked = read(await request.body(), EditRequest)
        opened = hub.of(asked.model)
        key = ("edit", asked.tab, asked.pane)
        task = Task(LIVE, asked.tab, lambda _: check(opened.model, asked.edit, asked.prompt, asked.other), key=key)
        await asyncio.wrap_future(opened.worker.submit(task))
        return reply({})

    @app.post("/api/view")
    async def view(request: Request) -> Response:
        asked = read(await request.body(), ViewRequest)
        opened = hub.of(asked.model)
        key = ("view", asked.tab, asked.pane, asked.view)
        task = Task(VIEW, asked.tab, lambda _: draw(opened.model, opened.live.memory, asked), key=key)
        return reply(await asyncio.wrap_future(opened.worker.submit(task)))

    @app.post("/api/chat")
    async def chat(request: Request) -> Response:
        asked = read(await request.body(), ChatRequest)
        opened = hub.of(asked.model)
        opened.chat.check(asked)
        tasks: list[Task] = []

        def start(tell: Tell) -> asyncio.Future[ChatEnd]:
            key = ("chat", asked.tab, asked.pane)
            tasks.append(Task(VIEW, asked.tab, lambda _: opened.chat.answer(asked, tell), key=key))
            return asyncio.wrap_future(opened.worker.submit(tasks[0]))

        answer = streamed(start, lambda: opened.worker.drop(tasks[0]))
        return StreamingResponse(answer, media_type="application/x-ndjson")

    _job_routes(app, Jobs(hub))
    _workspace_routes(app, Folder(folder))

    @app.post("/api/export/html")
    async def html(request: Request) -> Response:
        asked = read(await request.body(), PageRequest)
        whole = await run_in_threadpool(views_page, *asked.documents, title=asked.title or "pellucid workbench")
        return attachment(whole.encode(), "pellucid.html", "text/html; charset=utf-8")

    @app.post("/api/export/notebook")
    async def ipynb(request: Request) -> Response:
        asked = read(await request.body(), Workspace)
        made = await run_in_threadpool(notebook, hub, asked.state, asked.documents)
        return attachment(made, "pellucid.ipynb", "application/x-ipynb+json")

    return Guard(app, door)


def _job_routes(app: FastAPI, jobs: Jobs) -> None:
    @app.post("/api/jobs")
    async def start(request: Request) -> Response:
        return reply(Started(id=jobs.start(read(await request.body(), JobRequest))))

    @app.get("/api/jobs")
    async def listed() -> Response:
        return reply(JobList(jobs=jobs.listed()))

    @app.get("/api/jobs/{id}")
    async def one(id: str) -> Response:
        return reply(jobs.one(id))

    @app.delete("/api/jobs/{id}")
    async def remove(id: str) -> Response:
        jobs.remove(id)
        return reply({})


def _workspace_routes(app: FastAPI, folder: Folder) -> None:
    @app.get("/api/workspaces")
    async def listed() -> Response:
        return reply(Workspaces(folder=str(folder.path), workspaces=await run_in_threadpool(folder.listed)))

    @app.get("/api/workspaces/{name}")
    async def one(name: str) -> Response:
        return reply(await run_in_threadpool(folder.open, name))

    @app.put("/api/workspaces/{name}")
    async def save(name: str, request: Request) -> Response:
        await run_in_threadpool(folder.save, name, read(await request.body(), Workspace))
        return reply({})

    @app.delete("/api/workspaces/{name}")
    async def remove(name: str) -> Response:
        await run_in_threadpool(folder.remove, name)
        return reply({})


def _errors(app: FastAPI) -> None:
    """Whatever a route raises, as one sentence."""

    def handled(kind: Any, say: Callable[[Any], Response]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            return say(error)

        made: Callable[[Request, Exception], Awaitable[Response]] = handler
        app.add_exception_handler(kind, made)

    handled(PellucidError, lambda error: problem(422, str(error)))
    handled(Superseded, lambda error: problem(409, "a newer request has taken the place of this one", superseded=True))
    handled(HTTPException, lambda error: problem(error.status_code, _meaning(error)))
    handled(
        Exception, lambda error: problem(500, f"something unexpected went wrong ({type(error).__name__}); {DETAILS}")
    )


def _meaning(error: HTTPException) -> str:
    known = {404: "there is nothing at this address", 405: "this address does not take such a request"}
    return known.get(error.status_code, str(error.detail))
