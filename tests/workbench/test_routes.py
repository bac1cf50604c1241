"""Every route answers as the contract says, and says in one sentence what it cannot do."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.views import schema as s
from pellucid.views.schema import Document
from pellucid.workbench.hub import Hub
from pellucid.workbench.worker import LIVE, Task
from tests.workbench.conftest import OTHER, PROMPT, live, view

SCRIPT = "<script>alert(1)</script>"


def document(found: Any) -> Document:
    return Document.read(json.dumps(found))


def test_the_models_that_are_open_are_described(page: TestClient) -> None:
    found = page.get("/api/models").json()
    assert found["version"] == pl.__version__
    first, second = found["models"]
    assert (first["id"], first["kind"], first["layers"], first["heads"], first["generates"]) == (
        "0",
        "decoder",
        2,
        4,
        True,
    )
    assert (second["id"], second["kind"], second["generates"]) == ("1", "encoder", False)
    assert first["parameters"] > 10_000 and first["neurons"] == 48 and first["limit"] == 64


def test_live_gives_the_answer_the_grid_and_the_times(page: TestClient) -> None:
    edits = [{"component": "layers.1.attn.heads.0", "kind": "zero"}]
    found = page.post("/api/live", json=live(other=OTHER, edits=edits, generate=3, serial=5)).json()
    assert found["serial"] == 5 and len(found["clean"]["top"]) == 10 and found["edited"]["difference"] is not None
    assert document(found["lens"]).data.tokens == tuple(found["tokens"])
    assert found["milliseconds"]["total"] >= found["milliseconds"]["forward"] > 0
    assert page.post("/api/live", json=live(lens=False)).json()["lens"] is None


VIEWS: list[tuple[str, dict[str, Any], str]] = [
    ("tokens", {}, "tokens"),
    ("tokens", {"method": ["saliency", "occlusion"]}, "tokens"),
    ("attention", {"component": "layers.1.attn.heads.2"}, "attention"),
    ("contributions", {"by": "layer"}, "contributions"),
    ("heads", {}, "grid"),
    ("patching", {}, "grid"),
    ("patching", {"over": "heads"}, "grid"),
    ("anatomy", {}, "anatomy"),
    ("neurons", {"sort": "effect", "top": 7}, "table"),
    ("neuron", {"component": "layers.1.mlp.neurons.3"}, "neuron"),
]


@pytest.mark.parametrize(("name", "options", "kind"), VIEWS)
def test_every_panel_is_a_document_with_the_code_that_makes_it(
    page: TestClient, name: str, options: dict[str, Any], kind: str
) -> None:
    found = page.post("/api/view", json=view(name, other=OTHER, options=options)).json()
    shown = document(found["document"])
    assert found["document"]["data"]["kind"] == kind
    compile(shown.code.python, name, "exec")
    assert (found["rows"] is not None) == (name == "neurons")


def test_the_panels_code_makes_what_is_shown(
    page: TestClient, llama: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl, "load", lambda *a, **k: llama, raising=False)
    for name, options, _ in VIEWS:
        shown = document(page.post("/api/view", json=view(name, other=OTHER, options=options)).json()["document"])
        names: dict[str, Any] = {"module": None, "tokenizer": None}
        exec(shown.code.python, names)
        if isinstance(shown.data, s.Tokens) and len(shown.data.tracks) == 1:
            np.testing.assert_allclose(shown.data.tracks[0].values.array(), names["result"].values, atol=1e-6)
        elif isinstance(shown.data, s.Contributions):
            np.testing.assert_allclose(shown.data.values.array(), names["result"].values, atol=1e-6)
        elif name == "patching":
            assert isinstance(shown.data, s.Grid)
            np.testing.assert_allclose(shown.data.planes[0].values.array(), names["result"].values, atol=1e-6)


def test_words_say_which_contrast_is_asked_and_what_can_mislead_in_the_method(page: TestClient) -> None:
    """The rival is the second prompt's answer where there is one; either way it is named beside the words."""
    for other, says in ((OTHER, "the answer to the second prompt"), (None, "the runner-up")):
        shown = document(page.post("/api/view", json=view("tokens", other=other)).json()["document"])
        assert "rather than" in shown.lead and says in shown.lead
        assert "signs can be wrong" in shown.care
        assert isinstance(shown.data, s.Tokens) and "logit difference" in shown.data.unit and "−" in shown.data.unit
        assert "logit_difference" in shown.code.python


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"component": "layers.9.mlp.out", "kind": "zero"}, "there is no layer 9"),
        ({"component": "layers.1.mpl.out", "kind": "zero"}, "mlp.out"),  # the nearest
        ({"component": "layers.1.mlp.out", "kind": "patch"}, "second prompt"),
        ({"component": "layers.1.mlp.out", "kind": "steer"}, "second prompt"),
        ({"component": "layers.1.attn.pattern", "kind": "steer", "direction": "random"}, "no direction"),
        ({"component": "layers.1.mlp.out", "kind": "zero", "position": 99}, "outside the prompt"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused_before_it_is(page: TestClient, edit: dict[str, Any], says: str) -> None:
    refused = page.post("/api/edit", json=live(edit=edit))
    assert refused.status_code == 422 and says in refused.json()["error"] and "\n" not in refused.json()["error"]
    assert page.post("/api/live", json=live(edits=[edit])).status_code == 422  # as making it would


def test_an_edit_that_can_be_made_is_let_in(page: TestClient) -> None:
    for component in ("layers.1", "layers.0.attn.heads.2", "layers.1.mlp.neurons.3", "embed"):
        edit = {"component": component, "kind": "steer"}
        assert page.post("/api/edit", json=live(other=OTHER, edit=edit)).status_code == 200
        assert page.post("/api/live", json=live(other=OTHER, edits=[edit])).status_code == 200


def test_edits_reach_the_attention_and_other_panels_say_that_they_do_not(page: TestClient) -> None:
    edits = [{"component": "layers.0.mlp.out", "kind": "scale", "strength": 9.0}]
    plain, edited = (
        page.post("/api/view", json=view("attention", edits=e)).json()["document"]["data"] for e in ([], edits)
    )
    assert plain != edited
    assert "without your edits" in page.post("/api/view", json=view("tokens", edits=edits)).json()["note"]


def test_a_second_prompt_of_another_length_is_left_out_with_a_remark_unless_it_is_needed(page: TestClient) -> None:
    found = page.post("/api/view", json=view("contributions", other="The capital")).json()
    assert "second prompt is left out" in found["note"]
    refused = page.post("/api/view", json=view("patching", other="The capital"))
    assert refused.status_code == 422 and "align" in refused.json()["error"]
    assert "needs a second prompt" in page.post("/api/view", json=view("patching")).json()["error"]


def test_the_neurons_of_the_finder_are_those_of_the_run(page: TestClient, llama: pl.Model) -> None:
    run = llama.run(PROMPT, keep="layers.*.mlp.neurons")
    values = torch.stack(
        [run.tensor(f"layers.{i}.mlp.neurons")[0] for i in (0, 1)]
    ).detach()  # [layer, position, neuron]
    rows = page.post("/api/view", json=view("neurons", options={"top": 20})).json()["rows"]
    strongest = values.abs().amax(1).flatten().topk(20).values
    np.testing.assert_allclose([abs(r["activation"]) for r in rows], strongest, rtol=1e-5)
    for r in rows:
        assert r["activation"] == pytest.approx(float(values[r["layer"], r["position"], r["neuron"]]), rel=1e-5)
        assert (r["effect"] is None) == (r["position"] != 4)
    rows = page.post("/api/view", json=view("neurons", options={"layer": 1, "position": 2, "top": 5})).json()["rows"]
    assert {(r["layer"], r["position"]) for r in rows} == {(1, 2)}


def test_the_direct_effect_of_a_neuron_is_what_the_logit_loses_with_the_final_norm_held(
    page: TestClient, llama: pl.Model
) -> None:
    rows = page.post("/api/view", json=view("neurons", options={"sort": "effect", "layer": 1, "top": 3})).json()["rows"]
    for r in rows:  # in the last layer nothing but the norm's scale stands between
        keep = ["layers.1.resid_post"]
        edit = pl.Ablate(f"{r['component']}@-1")
        whole, without = (llama.run(PROMPT, keep=keep, edits=e).tensor(f"{keep[0]}@-1")[0, 0] for e in ([], [edit]))
        scale = whole.square().mean().add(1e-6).rsqrt()
        norm, head = llama.module.model.norm.weight, llama.module.lm_head.weight
        answer = int(llama.run(PROMPT).logits[0, -1].argmax())
        assert r["effect"] == pytest.approx(
            float((head[answer] * norm * (whole - without) * scale).sum().detach()), rel=1e-3
        )


def test_the_words_of_a_neuron_are_what_its_row_adds_to_the_logits(page: TestClient, llama: pl.Model) -> None:
    found = document(
        page.post("/api/view", json=view("neuron", options={"component": "layers.1.mlp.neurons.3"})).json()["document"]
    )
    row = llama.module.model.layers[1].mlp.down_proj.weight[:, 3].detach()  # at a residual of size 1
    best = ((row * llama.module.model.norm.weight.detach()) @ llama.module.lm_head.weight.detach().T).topk(12)
    assert [e.word for e in found.data.raises] == [llama.tokenizer.decode([i]) for i in best.indices.tolist()]  # type: ignore[union-attr]
    np.testing.assert_allclose([e.value for e in found.data.raises], best.values, rtol=1e-3)  # type: ignore[union-attr]


# ---- what cannot be done


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/api/live", live(prompt=""), "empty"),
    ("/api/live", live(prompt="the " * 65), "context holds 64"),
    ("/api/live", live(model="7"), "no model '7'"),
    ("/api/live", live(generate=65), "generate"),
    ("/api/live", {"tab": "t"}, "missing required field"),
    ("/api/live", live(edits=[{"component": "embed", "kind": "explode"}]), "explode"),
    ("/api/live", live(edits=[{"component": "embed", "kind": "zero"}] * 65), "edits"),
    ("/api/live", live(tab="x" * 81), "tab"),
    ("/api/view", view("poem"), "poem"),
    ("/api/view", view("tokens", options={"method": "magic"}), "no attribution method 'magic'"),
    ("/api/view", view("neurons", options={"sort": "size"}), "sorted by"),
    ("/api/view", view("neurons", options={"top": "many"}), "options cannot be used"),
    ("/api/view", view("neurons", options={"layer": 9}), "no neurons in layer 9"),
    ("/api/view", view("neuron", options={"component": "layers.0"}), "no single neuron"),
    ("/api/view", view("patching", other=OTHER, options={"over": "moon"}), "moon"),
    ("/api/view", view("contributions", options={"by": "moon"}), "moon"),
    ("/api/view", view("contributions", options={"by": ["moon"]}), "moon"),
    ("/api/view", view("tokens", options={"method": [{}]}), "no attribution method"),
    ("/api/view", view("tokens", options={"method": 3}), "no attribution method"),
    ("/api/view", view("patching", other=OTHER, options={"over": []}), "nothing to patch over"),
    ("/api/view", view("contributions", model="1", prompt="The <mask> is"), "not linear"),
    ("/api/export/html", {"documents": []}, "at least one"),
    ("/api/export/html", {"documents": [{"title": "x"}]}, "no PageRequest"),
    ("/api/export/notebook", {"state": {"version": 2, "panes": []}}, "no Workspace"),
]


@pytest.mark.parametrize(("route", "body", "says"), BAD)
def test_what_cannot_be_done_is_one_sentence(page: TestClient, route: str, body: dict[str, Any], says: str) -> None:
    found = page.post(route, json=body)
    assert found.status_code == 422
    assert says in found.json()["error"] and "\n" not in found.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"tab": 1e999}', b"null"])
def test_a_body_that_is_no_message_is_one_sentence(page: TestClient, body: bytes) -> None:
    for route in ("/api/live", "/api/view", "/api/jobs", "/api/export/html"):
        assert page.post(route, content=body).status_code == 422


def test_wrong_methods_and_addresses_are_sentences_too(page: TestClient) -> None:
    assert page.get("/api/live").status_code == 405
    assert page.post("/api/models").json()["error"] == "this address does not take such a request"
    assert page.get("/api/nothing").status_code == 404


def test_a_bug_is_a_sentence_without_its_traceback(page: TestClient, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.models["0"].live, "reply", lambda *a: 1 / 0)
    found = page.post("/api/live", json=live())
    assert found.status_code == 500
    assert "ZeroDivisionError" in found.json()["error"] and "Traceback" not in found.text
    assert found.headers["content-security-policy"]


def test_an_outdated_request_is_answered_409(page: TestClient, hub: Hub) -> None:
    gate, begun = threading.Event(), threading.Event()
    hub.models["0"].worker.submit(Task(LIVE, "other", lambda _: (begun.set(), gate.wait(10))))
    assert begun.wait(10)
    with ThreadPoolExecutor(2) as pool:
        old = pool.submit(page.post, "/api/live", json=live(serial=1))
        worker = hub.models["0"].worker
        while not any(task.tab == "t" for task in worker._known()):
            threading.Event().wait(0.01)
        new = pool.submit(page.post, "/api/live", json=live(serial=2))
        outdated = old.result(10)
        gate.set()
        assert new.result(10).json()["serial"] == 2
    assert outdated.status_code == 409 and outdated.json()["superseded"] is True


# ---- text that tries to be markup


def test_markup_in_prompts_comes_back_as_text(page: TestClient) -> None:
    found = page.post("/api/live", json=live(prompt=f"{SCRIPT} Paris", other=f"{SCRIPT} Rome"))
    assert found.headers["content-type"] == "application/json"
    for name, options, _ in VIEWS:
        made = page.post(
            "/api/view", json=view(name, prompt=f"{SCRIPT} Paris", other=f"{SCRIPT} Rome", options=options)
        )
        assert made.status_code == 200 and made.headers["content-type"] == "application/json"
    error = page.post("/api/live", json=live(model=SCRIPT))
    assert error.headers["content-type"] == "application/json" and SCRIPT in error.json()["error"]


def test_markup_cannot_break_out_of_an_exported_page(page: TestClient) -> None:
    data = {"kind": "table", "columns": [{"name": SCRIPT, "texts": [SCRIPT, "</script>", "<!--"]}], "rows": 3}
    shown = {"title": SCRIPT, "pellucid-view": 1, "data": data, "lead": SCRIPT, "code": {"python": SCRIPT}}
    found = page.post("/api/export/html", json={"title": SCRIPT, "documents": [shown]})
    assert found.headers["content-disposition"].startswith("attachment")
    assert "<script>alert" not in found.text
    assert found.text.count("<script") == 2 + found.text.count('"<script')  # the data and the views themselves


def test_the_page_and_its_messages_are_those_of_the_schema() -> None:
    text = Path(__file__).parents[2].joinpath("web", "src", "workbench", "messages.ts").read_text("utf-8")
    for name in ("LiveRequest", "LiveReply", "ViewReply", "Job", "State", "Edit"):
        assert f"export interface {name} {{" in text
