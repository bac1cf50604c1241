"""A workbench with two tiny models, and a page that talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.workbench.app import create
from pellucid.workbench.guard import Door
from pellucid.workbench.hub import Hub
from tests.zoo import build, tokenizer

TOKEN = "a token nobody guesses"
PROMPT, OTHER = "The capital of France is", "The capital of Italy is"


def tiny(kind: str) -> pl.Model:
    module = build(kind)
    return pl.load(module, tokenizer=tokenizer(module))


@pytest.fixture(scope="session")
def llama() -> pl.Model:
    return tiny("llama")


@pytest.fixture(scope="session")
def bert() -> pl.Model:
    return tiny("bert")


@pytest.fixture
def hub(llama: pl.Model, bert: pl.Model) -> Iterator[Hub]:
    made = Hub([llama, bert])
    yield made
    made.close()


@pytest.fixture
def page(hub: Hub, tmp_path: Path) -> TestClient:
    """A client with the token, as the page is one; errors of the server come as answers."""
    app = create(hub, Door(TOKEN, 8000), tmp_path / "workspaces")
    headers = {"X-Pellucid-Token": TOKEN, "Origin": "http://localhost:8000"}
    return TestClient(app, base_url="http://localhost:8000", headers=headers, raise_server_exceptions=False)


def live(**more: object) -> dict[str, object]:
    return {"tab": "t", "pane": "a", "model": "0", "prompt": PROMPT, **more}


def view(name: str, **more: object) -> dict[str, object]:
    return {**live(), "view": name, **more}


def job(kind: str, **more: object) -> dict[str, object]:
    return {"tab": "t", "model": "0", "kind": kind, "prompt": PROMPT, "other": OTHER, **more}
