"""Workspaces come back as they were saved, from their folder and nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from pellucid.errors import InputError
from pellucid.workbench.messages import Edit, Pane, Selection, State, Workspace
from pellucid.workbench.workspaces import ENDING, Folder
from tests.views import gallery
from tests.workbench.conftest import OTHER, PROMPT

STATE = State(
    panes=[Pane(pane="a", model="gpt2", prompt=f"{PROMPT} <script>", other=OTHER, edits=[Edit(component="embed", kind="zero")], views=["tokens"], generate=8)],
    selection=Selection(component="layers.1", position=3), neurons={"sort": "effect"},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "kept")


def test_what_is_saved_is_opened_again(folder: Folder) -> None:
    whole = Workspace(state=STATE, documents=[*gallery.gallery(), *gallery.nasty()])
    assert folder.listed() == []
    folder.save("My notes_1.2-b", whole)
    assert folder.open("My notes_1.2-b") == whole
    assert [entry.name for entry in folder.listed()] == ["My notes_1.2-b"]
    folder.save("My notes_1.2-b", Workspace(state=State(panes=[])))
    assert folder.open("My notes_1.2-b").state.panes == []
    assert os.listdir(folder.path) == ["My notes_1.2-b.pellucid.json"]  # nothing half written is left
    folder.remove("My notes_1.2-b")
    assert folder.listed() == []


def test_the_routes_save_list_open_and_remove(page: TestClient) -> None:
    body = json.loads(
        json.dumps({"state": {"panes": [{"pane": "a", "model": "m", "prompt": "<script>"}]}, "documents": []})
    )
    assert page.put("/api/workspaces/first one", json=body).json() == {}
    found = page.get("/api/workspaces").json()
    assert found["workspaces"][0]["name"] == "first one" and found["workspaces"][0]["modified"] > 1e9
    assert page.get("/api/workspaces/first one").json()["state"]["panes"][0]["prompt"] == "<script>"
    assert page.delete("/api/workspaces/first one").json() == {}
    assert "no workspace" in page.get("/api/workspaces/first one").json()["error"]
    assert "no workspace" in page.delete("/api/workspaces/first one").json()["error"]
    assert page.put("/api/workspaces/x", json={"state": {"panes": [{"pane": "a"}]}}).status_code == 422


ESCAPES = ["..", ".", ".hidden", "../x", "../../etc/passwd", "a/b", "a\\b", "/etc/passwd", "C:x", "x\0", "x\n", "", "x" * 81, "é", "a:b", "~", "<script>", "..\\x", "x%2f"]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_folder(folder: Folder, page: TestClient, tmp_path: Path, name: str) -> None:
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    for act in (folder.open, folder.remove, lambda n: folder.save(n, Workspace(state=STATE))):
        with pytest.raises(InputError, match="1 to 80 letters"):
            act(name)
    for method in ("GET", "DELETE", "PUT"):
        found = page.request(method, f"/api/workspaces/{quote(name, safe='')}", content=b'{"state": {"panes": []}}')
        assert found.status_code in (404, 405, 422) or (name in ("", ".", "..") and method == "GET")
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_links_are_neither_followed_nor_listed(folder: Folder, tmp_path: Path) -> None:
    outside = tmp_path / f"secret{ENDING}"
    outside.write_text('{"state": {"panes": []}}')
    folder.path.mkdir()
    (folder.path / f"link{ENDING}").symlink_to(outside)
    (folder.path / f"dangling{ENDING}").symlink_to(tmp_path / "new")
    (folder.path / f"directory{ENDING}").mkdir()
    os.mkfifo(folder.path / f"pipe{ENDING}")
    assert folder.listed() == []
    for name in ("link", "dangling", "directory", "pipe"):
        with pytest.raises(InputError, match="no workspace"):
            folder.open(name)
    folder.save("link", Workspace(state=STATE))
    folder.save("dangling", Workspace(state=STATE))
    assert outside.read_text() == '{"state": {"panes": []}}' and not (tmp_path / "new").exists()
    assert folder.open("link").state == STATE and not (folder.path / f"link{ENDING}").is_symlink()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x80\x04pickle", b'{"state": 3}', b'{"state": {"version": 2, "panes": []}}', b"[" * 10_000],
)
def test_a_file_that_is_no_workspace_is_one_sentence(folder: Folder, content: bytes) -> None:
    folder.path.mkdir()
    (folder.path / f"broken{ENDING}").write_bytes(content)
    with pytest.raises(InputError, match="no Workspace"):
        folder.open("broken")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot save 'x'"):
        Folder(tmp_path / "file").save("x", Workspace(state=STATE))
