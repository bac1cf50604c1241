"""`pellucid monitor`: from labelled conversations to a saved, calibrated monitor that watches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pellucid
from pellucid import safety
from pellucid.cli import main
from tests.engine.hand import opened

Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Says:
    model = opened("gpt2")
    monkeypatch.setitem(vars(pellucid), "load", lambda source, **how: model)

    def run(verb: str, *arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["monitor", verb, "tiny", *map(str, arguments)])
        return int(left.value.code or 0), *capsys.readouterr()

    return run


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


CITIES = ["Rome", "Paris"]
ROWS = [
    {"prompt": f"{'John' if i % 2 else 'Mary'} is in {CITIES[i // 2 % 2]} {i}", "reply": "The city of Paris is in France" if i % 2 else "he gave a drink",
     "label": bool(i % 2), "source": f"s{i // 8}"} for i in range(60)
]  # fmt: skip


def test_from_conversations_to_a_monitor_that_stops(says: Says, tmp_path: Path) -> None:
    fit, rest = written(tmp_path / "fit.jsonl", ROWS[:16]), written(tmp_path / "rest.jsonl", ROWS[16:])
    file, page = tmp_path / "monitor.safetensors", tmp_path / "page.html"
    code, out, err = says("fit", "--data", fit, "--site", "layers.1.resid_post", "--name", "city", "-o", file)
    assert (code, err) == (0, "") and "no threshold yet" in out
    assert says("watch", file, "Mary")[0] == 0  # it only records
    code, out, _ = says("calibrate", file, "--data", rest, "--alarms", 0.05, "--then", "say", "--text", "Rome")
    assert code == 0 and "city fires above" in out and "from 22" in out
    monitor = safety.load_monitor(opened("gpt2"), file)
    assert monitor.then.text == "Rome" and monitor.threshold.n == 22
    code, out, _ = says("watch", file, "--data", rest, "-o", page)
    assert code == 0 and "- all: alarms 0.000" in out and "- s2: " in out and "recall 1.000" in out and page.exists()
    code, out, _ = says("watch", file, "The city of", "--max-new-tokens", 3)
    assert code == 0 and ("city fired" in out or "no alarm" in out)


def test_what_cannot_be_used_is_one_line_and_code_two(says: Says, tmp_path: Path) -> None:
    fit = written(tmp_path / "fit.jsonl", ROWS[:16])
    bare = written(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    site = ("--site", "layers.1.resid_post")
    file = tmp_path / "m.safetensors"
    assert says("fit", "--data", fit, *site, "-o", file)[0] == 0
    for arguments, what in (
        (("fit", "--data", bare, *site), "conversation 1 has no label"), (("fit", "--data", tmp_path / "none.jsonl", *site), "cannot read"),
        (("fit", "--data", written(tmp_path / "x.jsonl", [["no"]]), *site), "line 1"),  # type: ignore[list-item]
        (("fit", "--data", fit, *site, "-o", tmp_path / "no" / "m"), "cannot write"), (("calibrate", file, "--data", fit), "takes 19 at least"),
        (("calibrate", file, "--data", written(tmp_path / "y.jsonl", ROWS[1:2])), "labelled true"),
        (("calibrate", fit, "--data", fit), "holds no monitor"), (("watch", file), "give a prompt"),
        (("fit", "--data", written(tmp_path / "z.jsonl", [ROWS[0], {"prompt": "a", "label": True}]), *site), "split the file"),
    ):  # fmt: skip
        code, _, err = says(*arguments)
        assert code == 2 and what in err and err.count("\n") == 1, (arguments, err)
