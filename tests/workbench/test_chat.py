"""An answer in the workbench: its tokens come one by one with what the monitors read, and the end says who stopped it and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.errors import InputError
from pellucid.views.schema import Document
from pellucid.workbench.app import create
from pellucid.workbench.chat import Files
from pellucid.workbench.guard import Door
from pellucid.workbench.hub import Hub
from tests.workbench.conftest import TOKEN, tiny
from tests.workbench.guards import PROMPT, SITE, TEMPLATE, files, monitor


@pytest.fixture(scope="module")
def model() -> pl.Model:
    made = tiny("llama")
    made.tokenizer.chat_template = TEMPLATE  # type: ignore[union-attr]
    return made


@pytest.fixture(scope="module")
def page(model: pl.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("guards")
    hub = Hub([model, tiny("bert")], Files(*files(model, folder)))
    headers = {"X-Pellucid-Token": TOKEN, "Origin": "http://localhost:8000"}
    yield TestClient(
        create(hub, Door(TOKEN, 8000), folder),
        base_url="http://localhost:8000",
        headers=headers,
        raise_server_exceptions=False,
    )
    hub.close()


@pytest.fixture
def vector(model: pl.Model, tmp_path: Path) -> pl.safety.Vector:
    return pl.safety.load_vectors(files(model, tmp_path)[1][0])[0]


def ask(page: TestClient, text: str = PROMPT, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    asked = {
        "tab": "t",
        "pane": "a",
        "model": "0",
        "turns": [{"role": "user", "content": text}],
        "chat": False,
        "max_new_tokens": 10,
    }
    found = page.post("/api/chat", json={**asked, **more})
    lines = [json.loads(line) for line in found.text.splitlines()]
    return lines[:-1], lines[-1] | {"status": found.status_code}


def test_an_answer_is_stopped_before_the_token_and_the_reason_is_told(page: TestClient, model: pl.Model) -> None:
    steps, end = ask(page, monitors=["harm"])
    made = model.generate(PROMPT, max_new_tokens=10, monitors=monitor(model))
    assert end["shown"] == made.text and end["ended"] == "watcher" and end["tokens"] == 4 and not end["replaced"]
    assert [a["monitor"] for a in end["acted"]] == ["harm"] and end["acted"][0]["token"] == 4
    told = np.array([step["statistic"][0] for step in steps])
    assert np.allclose(told, made.firings.statistic.values[0, 0], atol=1e-6)
    assert [step["fired"][0] for step in steps] == [False] * 4 + [True] and steps[3]["text"] == made.text
    assert Document.read(json.dumps(end["document"])).title == made.firings.title


def test_an_answer_is_replaced_and_what_was_written_is_kept_apart(page: TestClient, model: pl.Model) -> None:
    steps, end = ask(page, monitors=["careful", "harm"])
    assert end["replaced"] and end["shown"] == "I would rather not."
    assert end["text"] == model.generate(PROMPT, max_new_tokens=4).text
    assert steps[2]["instead"] == "" and steps[-1]["instead"] == "I would rather not."


def test_without_monitors_the_text_is_that_of_generate_and_its_perplexity_is_that_of_one_pass(page: TestClient, model: pl.Model, vector: pl.safety.Vector) -> None:  # fmt: skip
    for more in ({}, {"temperature": 0.9, "seed": 3}, {"vector": "cheer", "strength": 1.0}):
        steps, end = ask(page, **more)
        edits = [vector.edit(1.0)] if "vector" in more else []
        made = model.generate(
            PROMPT, max_new_tokens=10, edits=edits, temperature=more.get("temperature", 0.0), seed=more.get("seed", 0)
        )
        assert end["shown"] == made.text == steps[-1]["text"] and len(steps) == end["tokens"]
        ids = torch.cat([model.inputs(PROMPT).tensors["input_ids"][0], torch.tensor(made.ids(0))])
        log_p = model.run(ids[None]).logits[0].float().log_softmax(-1)
        n = len(made.ids(0))
        own = log_p[-n - 1 : -1].gather(1, ids[-n:, None]).mean()
        assert math.isclose(end["perplexity"], float((-own).exp()), rel_tol=1e-4)


def test_a_chat_goes_through_the_template_and_remembers(page: TestClient, model: pl.Model) -> None:
    turns = [
        {"role": "user", "content": "John"},
        {"role": "assistant", "content": "Mary"},
        {"role": "user", "content": "store"},
    ]
    _, end = ask(page, turns=turns, chat=True)
    assert end["shown"] == model.generate(turns, max_new_tokens=10).text


def test_the_card_names_monitors_vectors_and_prices(page: TestClient) -> None:
    first, second = (each["chat"] for each in page.get("/api/models").json()["models"])
    assert [(m["name"], m["does"], m["threshold"]) for m in first["monitors"]] == [
        ("harm", "stops", 0.5),
        ("careful", "says something else instead", 0.5),
    ]
    assert first["vectors"][0]["site"] == SITE and len(first["vectors"][0]["prices"]) == 4
    assert second["monitors"] == [] and "writes no text" in second["refused"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"model": "1"}, "writes no text"),
        ({"monitors": ["other"]}, "no monitor 'other'"),
        ({"vector": "other"}, "no vector 'other'"),
        ({"turns": []}, "nothing to answer"),
        ({"turns": [{"role": "user", "content": ""}]}, "nothing to answer"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(page: TestClient, asked: dict[str, Any], says: str) -> None:
    _, end = ask(page, **asked)
    assert end["status"] == 422 and says in end["error"]


def test_what_goes_wrong_while_writing_ends_the_stream_with_a_sentence(page: TestClient) -> None:
    _, end = ask(page, "a " * 3000)
    assert end["status"] == 200 and "token" in end["error"] and not end["superseded"]


def test_files_of_other_weights_are_refused_by_name(model: pl.Model, tmp_path: Path) -> None:
    monitors, vectors = files(model, tmp_path)
    other, bert = tiny("gpt2"), tiny("bert")
    for given in ({"monitors": monitors}, {"vectors": vectors}):
        with pytest.raises(InputError, match="weights"):
            Files(**given).sorted([other])
        with pytest.raises(InputError, match="writes no text"):
            Files(**given).sorted([bert])
    assert [len(chat.monitors) for chat in Files(monitors).sorted([model, other])] == [2, 0]


def test_an_encoder_decoder_answers_under_a_monitor_and_has_no_perplexity(tmp_path: Path) -> None:
    t5 = tiny("t5")
    read = pl.safety.Monitor(pl.safety.Direction("decoder.layers.0.resid_post", torch.zeros(t5.anatomy.stacks[-1].d_model)), threshold=1.0)  # fmt: skip
    hub = Hub([t5], Files([read.tie(t5).save(tmp_path / "m.safetensors")]))
    headers = {"X-Pellucid-Token": TOKEN, "Origin": "http://localhost:8000"}
    steps, end = ask(TestClient(create(hub, Door(TOKEN, 8000), tmp_path), base_url="http://localhost:8000", headers=headers), monitors=["monitor"])  # fmt: skip
    assert (
        end["perplexity"] is None
        and len(steps) >= end["tokens"] > 0
        and all(s["statistic"] == [0.0] for s in steps[1:])
    )
    hub.close()
