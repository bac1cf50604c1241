"""Jobs run to their end, say how far they are, end when told to, and are there for every page."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.views.schema import Document
from pellucid.workbench import jobs as jobs_module
from pellucid.workbench.hub import Hub
from pellucid.workbench.worker import LIVE, Task
from tests.workbench.conftest import OTHER, PROMPT, TOKEN, job, live


def start(page: TestClient, kind: str, **more: Any) -> str:
    found = page.post("/api/jobs", json=job(kind, **more))
    assert found.status_code == 200, found.text
    return found.json()["id"]


def until(page: TestClient, id: str, *states: str) -> dict[str, Any]:
    for _ in range(1000):
        found = page.get(f"/api/jobs/{id}").json()
        if found["state"] in states:
            return found
        time.sleep(0.01)
    raise AssertionError(f"job stayed {found['state']}")


def finished(page: TestClient, id: str) -> dict[str, Any]:
    return until(page, id, "done", "failed", "cancelled")


@pytest.mark.parametrize("kind", ["head_ablation", "patching", "circuit", "neuron_ablation"])
@pytest.mark.parametrize("other", [OTHER, None])
def test_every_kind_of_job_gives_a_view_with_its_code_and_what_to_mind(
    page: TestClient, kind: str, other: str | None
) -> None:
    if kind == "patching" and other is None:
        assert "second prompt" in finished(page, start(page, kind, other=None))["error"]
        return
    found = finished(page, start(page, kind, other=other))
    assert (found["state"], found["error"]) == ("done", "")
    assert found["done"] == found["total"] > 0 and found["seconds"] > 0 and found["prompt"] == PROMPT
    shown = Document.read(json.dumps(found["document"]))
    compile(shown.code.python, kind, "exec")
    assert shown.care or kind == "patching"


def test_a_job_gives_what_its_code_gives(page: TestClient, llama: pl.Model) -> None:
    found = finished(page, start(page, "head_ablation", other=None))["document"]
    logits = llama.run(PROMPT).logits[0, -1]
    answer, rival = logits.topk(2).indices.tolist()
    effect = pl.causal.ablation(llama, PROMPT, metric=pl.metrics.logit_difference(answer, rival)).values
    plane = Document.read(json.dumps(found)).data.planes[0]  # type: ignore[union-attr]
    np.testing.assert_allclose(plane.values.array(), effect, atol=1e-5)


def test_the_circuits_caveat_names_its_faithfulness_and_that_of_random_edges(page: TestClient) -> None:
    found = finished(page, start(page, "circuit", options={"edges": 82, "steps": 2}))
    assert "give 100% of the answer" in found["document"]["care"] and "random ones" in found["document"]["care"]
    assert found["document"]["data"]["kind"] == "circuit"


class Stopping:
    """Lets a job go on only when it is told to, at its first pause."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        real = jobs_module.Entry.told

        def told(entry: jobs_module.Entry, moment: Any) -> None:
            real(entry, moment)
            self.reached.set()
            assert self.go_on.wait(10)

        monkeypatch.setattr(jobs_module.Entry, "told", told)


def test_a_running_job_is_cancelled_at_its_next_batch_and_then_removed(
    page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = Stopping(monkeypatch)
    id = start(page, "head_ablation")
    assert stopping.reached.wait(10)
    running = page.get(f"/api/jobs/{id}").json()
    assert (running["state"], running["done"], running["total"]) == ("running", 0, 8)
    assert page.delete(f"/api/jobs/{id}").json() == {}
    stopping.go_on.set()
    assert until(page, id, "cancelled", "done")["state"] == "cancelled"
    assert [j["id"] for j in page.get("/api/jobs").json()["jobs"]] == [id]
    page.delete(f"/api/jobs/{id}")
    assert page.get("/api/jobs").json()["jobs"] == []
    assert "no job" in page.get(f"/api/jobs/{id}").json()["error"]


def test_a_waiting_job_is_cancelled_at_once(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Stopping(monkeypatch)
    first = start(page, "head_ablation")
    assert stopping.reached.wait(10)
    second = start(page, "patching")
    assert page.get(f"/api/jobs/{second}").json()["state"] == "queued"
    page.delete(f"/api/jobs/{second}")
    assert page.get(f"/api/jobs/{second}").json()["state"] == "cancelled"
    stopping.go_on.set()
    assert finished(page, first)["state"] == "done"


def test_typing_is_answered_while_a_job_is_not_done(
    page: TestClient, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job pauses before its last batch; a request that comes then is served before the job ends."""
    stopping, order = Stopping(monkeypatch), []
    id = start(page, "head_ablation")
    assert stopping.reached.wait(10)
    typed = hub.models["0"].worker.submit(Task(LIVE, "other tab", lambda _: order.append(page_state())))

    def page_state() -> str:
        return page.get(f"/api/jobs/{id}").json()["state"]

    stopping.go_on.set()
    typed.result(10)
    assert order == ["running"]
    assert finished(page, id)["state"] == "done"


def test_the_answer_while_a_job_pauses_is_the_answer_without_a_job(
    page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [{"component": "layers.0.resid_post", "kind": "steer", "strength": 2.0}]
    alone = page.post("/api/live", json=live(other=OTHER, edits=edits)).json()
    truth = finished(page, start(page, "patching"))["document"]["data"]
    stopping = Stopping(monkeypatch)
    id = start(page, "patching")
    assert stopping.reached.wait(10)
    threading.Timer(0.05, stopping.go_on.set).start()
    during = page.post("/api/live", json=live(other=OTHER, edits=edits, tab="u")).json()
    assert (during["clean"], during["edited"]) == (alone["clean"], alone["edited"])
    assert finished(page, id)["document"]["data"] == truth


def test_jobs_outlive_the_page_that_started_them(page: TestClient) -> None:
    ids = [start(page, "head_ablation"), start(page, "patching", tab="another")]
    for id in ids:
        finished(page, id)
    reloaded = TestClient(page.app, base_url="http://localhost:8000", headers={"X-Pellucid-Token": TOKEN})
    found = reloaded.get("/api/jobs").json()["jobs"]
    assert [j["id"] for j in found] == ids[::-1]
    assert all(j["document"] is None for j in found)
    assert reloaded.get(f"/api/jobs/{ids[0]}").json()["document"] is not None


def test_a_job_that_fails_says_why_and_the_model_goes_on(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, says in (({"how": "magic"}, "how='magic'"), ({"how": 3}, "how=3")):
        assert says in finished(page, start(page, "head_ablation", options=options))["error"]
    for options, says in (({"top": 0}, "top=0"), ({"top": True}, "top=True"), ({"sort": "x"}, "sort='x'")):
        assert says in finished(page, start(page, "neuron_ablation", options=options))["error"]
    monkeypatch.setitem(jobs_module.WORK, "patching", lambda *a: 1 / 0)
    found = finished(page, start(page, "patching"))
    assert found["state"] == "failed" and "ZeroDivisionError" in found["error"] and "Traceback" not in found["error"]
    assert page.post("/api/live", json=live()).status_code == 200


def test_only_so_many_jobs_wait_and_old_ones_are_forgotten(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "UNFINISHED", 2)
    monkeypatch.setattr(jobs_module, "KEPT", 3)
    stopping = Stopping(monkeypatch)
    first = [start(page, "head_ablation"), start(page, "head_ablation")]
    refused = page.post("/api/jobs", json=job("head_ablation"))
    assert refused.status_code == 422 and "waiting already" in refused.json()["error"]
    stopping.go_on.set()
    for id in first:
        finished(page, id)
    last = [start(page, "head_ablation") for _ in range(2) if not time.sleep(0.2)]
    for id in last:
        finished(page, id)
    assert [j["id"] for j in page.get("/api/jobs").json()["jobs"]] == [*last[::-1], first[1]]
    assert page.post("/api/jobs", json=job("dance")).status_code == 422
    assert "no model" in page.post("/api/jobs", json=job("patching", model="9")).json()["error"]
