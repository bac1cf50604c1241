"""An exported notebook is a valid one, its cells run, and nothing from a file becomes code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.views.schema import Document
from pellucid.workbench.hub import Hub
from pellucid.workbench.messages import Edit, Pane, State
from pellucid.workbench.notebook import SAVED, notebook
from tests.views import gallery
from tests.workbench.conftest import OTHER, PROMPT, live, tiny

EDITS = [
    Edit(component="layers.1.attn.heads.2", kind="zero"),
    Edit(component="layers.0", kind="scale", strength=0.5),
    Edit(component="layers.0.mlp.neurons.5", kind="mean", position=2),
    Edit(component="layers.1", kind="steer", strength=2.0, position=-1),
    Edit(component="layers.0.resid_post", kind="steer", direction="random", seed=3),
    Edit(component="layers.0.attn.out", kind="patch", position=1),
    Edit(component="nothing", kind="zero", on=False),
]
ALL = ["tokens", "attention", "contributions", "heads", "patching", "anatomy", "neurons", "neuron"]


def cells(made: bytes) -> list[dict[str, Any]]:
    return json.loads(made)["cells"]


def run(made: bytes, monkeypatch: pytest.MonkeyPatch, model: pl.Model) -> dict[str, Any]:
    """Execute every code cell in turn, with the model at hand in the place of the one to be loaded."""
    monkeypatch.setattr(pl, "load", lambda *a, **k: model, raising=False)
    names: dict[str, Any] = {"module": None, "tokenizer": None}
    for cell in cells(made):
        if cell["cell_type"] == "code":
            exec(cell["source"], names)
    return names


def test_the_cells_run_and_give_what_the_page_showed(
    page: TestClient, hub: Hub, llama: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pane = Pane(
        pane="a", model=hub.models["0"].card.name, prompt=PROMPT, other=OTHER, edits=EDITS, views=ALL, generate=4
    )
    shown = page.post("/api/live", json=live(other=OTHER, edits=json.loads(json.dumps([{f: getattr(e, f) for f in e.__struct_fields__} for e in EDITS])))).json()  # fmt: skip
    names = run(notebook(hub, State(panes=[pane]), []), monkeypatch, llama)
    for run_, side in ((names["run"], "clean"), (names["edited"], "edited")):
        logits = run_.logits[0, -1].detach()
        np.testing.assert_allclose([c["logit"] for c in shown[side]["top"]], logits.topk(10).values, rtol=1e-4)
    lens = next(c["source"] for c in cells(notebook(hub, State(panes=[pane]), [])) if "logit_lens" in c["source"])
    again = eval(lens.removesuffix(".show()"), names)  # of the edited run, as the page's grid is
    reading = Document.read(json.dumps(shown["lens"])).data.readings[0]
    np.testing.assert_allclose(again["probability"].values, reading.probability.array(), atol=1e-5)
    assert names["answer"] == shown["clean"]["top"][0]["id"]
    difference = llama.score(names["edited"], names["metric"]).item()
    assert difference == pytest.approx(shown["edited"]["difference"], abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_notebooks_of_other_kinds_of_models_run_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([tiny(kind)])
    prefix = hub.models["0"].model.anatomy.stacks[-1].prefix
    edits = [Edit(component=f"{prefix}layers.0.attn.heads.1", kind="mean"), Edit(component=f"{prefix}layers.1.resid_post", kind="steer")]  # fmt: skip
    views = ["tokens", "attention", "heads", "patching", "anatomy"]
    pane = Pane(
        pane="a", model=hub.models["0"].card.name, prompt=PROMPT, other=OTHER, edits=edits, views=views, generate=3
    )
    names = run(notebook(hub, State(panes=[pane]), []), monkeypatch, hub.models["0"].model)
    assert isinstance(names["run"].logits, torch.Tensor)
    hub.close()


def test_the_file_has_the_form_of_format_4_5(page: TestClient, hub: Hub) -> None:
    state = {
        "panes": [
            {"pane": "a", "model": "m", "prompt": PROMPT, "views": ALL},
            {"pane": "b", "model": "m", "prompt": ""},
        ]
    }
    found = page.post(
        "/api/export/notebook", json={"state": state, "documents": [json.loads(gallery.gallery()[0].json())]}
    )
    assert found.headers["content-disposition"] == 'attachment; filename="pellucid.ipynb"'
    whole = found.json()
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in whole["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", id) for id in ids)
    for cell in whole["cells"]:
        needed = {"id", "cell_type", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert set(cell) == needed and isinstance(cell["source"], str)
    (shown,) = whole["cells"][-1]["outputs"]
    assert set(shown) == {"output_type", "metadata", "data"} and "data-pellucid" in shown["data"]["text/html"]


NASTY = "'''\"\"\"\\\n__import__('os').abort()\n# <script>alert(1)</script>"


def test_nothing_that_a_file_holds_becomes_code(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [Edit(component=NASTY[:80], kind="zero"), Edit(component="x')]; raise SystemExit #", kind="steer")]
    pane = Pane(pane=NASTY[:80], model=NASTY, prompt=NASTY, other=NASTY, edits=edits, views=[NASTY, "lens"], generate=1)
    state = State(panes=[pane], neurons={NASTY: NASTY})
    made = cells(notebook(hub, state, gallery.nasty()))
    for cell in made:
        if cell["cell_type"] == "markdown":
            assert "alert" not in cell["source"] and "abort" not in cell["source"]
    sources = [cell["source"] for cell in made if cell["cell_type"] == "code"]
    assert sources[-len(gallery.nasty()) :] == [SAVED] * len(gallery.nasty())
    import ast

    for source in sources:
        called = {ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}
        assert not called & {"__import__", "__import__('os').abort", "exec", "eval"}
        texts = [
            n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        assert "abort" not in source or any("abort" in text for text in texts)


def test_a_model_that_is_not_open_here_is_named_as_the_state_names_it(hub: Hub) -> None:
    made = notebook(hub, State(panes=[Pane(pane="a", model="gpt2", prompt=PROMPT, edits=[Edit(component="layers.3", kind="steer", direction="random")])]), [])  # fmt: skip
    text = "\n".join(cell["source"] for cell in cells(made))
    assert "pl.load('gpt2')" in text and "'layers.3.resid_post'" in text


def test_a_notebook_opens_the_model_from_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.zoo import build, tokenizer

    module = build("gpt2")
    module.save_pretrained(tmp_path / "mine")
    tokenizer(module).save_pretrained(tmp_path / "mine")
    hub = Hub([pl.load(tmp_path / "mine")])
    assert hub.models["0"].card.name == "mine"
    made = notebook(hub, State(panes=[Pane(pane="a", model="mine", prompt=PROMPT)]), [])
    names: dict[str, Any] = {}
    for cell in cells(made):
        if cell["cell_type"] == "code":
            exec(cell["source"], names)
    assert names["model"].digest == hub.models["0"].model.digest
    hub.close()
