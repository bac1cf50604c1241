"""`pellucid workbench` opens its models, tells its address, and warns when others can reach it."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pellucid
from pellucid.cli import app, main
from pellucid.workbench import serving
from tests.zoo import build, tokenizer


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the server is started with; it does not run, and no model is loaded."""
    started: list[tuple] = []
    monkeypatch.setattr(serving, "serve", lambda *given: started.append(given))
    monkeypatch.setitem(vars(pellucid), "load", lambda source, **how: source)
    return started


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["workbench", *arguments])
    return left.value.code, *capsys.readouterr()


def test_several_models_are_served_on_loopback_and_a_free_port(capsys, served) -> None:
    assert says(capsys, "gpt2", "bert", "--no-browser")[0] == 0
    models, host, port, folder, names, browser, _, files = served[0]
    assert not files.monitors and not files.vectors
    assert (models, host, port, folder, names, browser) == (
        ["gpt2", "bert"],
        "127.0.0.1",
        0,
        Path("workspaces"),
        [],
        False,
    )


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("10.0.0.5", True), ("::", True)],
)
def test_listening_beyond_loopback_is_warned_about(capsys, served, host: str, warns: bool) -> None:
    _, _, err = says(capsys, "gpt2", "--host", host)
    assert ("open to the network" in err) is warns


def test_what_cannot_be_served_is_one_line(capsys, served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = says(capsys, "gpt2", "--folder", str(tmp_path / "file"))
    assert code == 2 and "no directory" in err
    assert says(capsys)[0] == 2
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "pellucid.workbench.serving":
            raise ModuleNotFoundError(name="fastapi")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = says(capsys, "gpt2")
    assert code == 2 and "pip install 'pellucid[workbench]'" in err and err.count("\n") == 1


def test_the_verb_explains_itself() -> None:
    shown = CliRunner().invoke(app, ["workbench", "--help"])
    assert shown.exit_code == 0 and "MODEL" in shown.output and "--host" in shown.output


def test_a_port_that_is_taken_is_one_sentence() -> None:
    taken = serving.bound("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(pellucid.errors.InputError, match="cannot listen on 127.0.0.1"):
        serving.bound("127.0.0.1", taken.getsockname()[1])
    taken.close()


@pytest.mark.slow
def test_the_real_server_answers_at_the_address_it_prints_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    module = build("gpt2")
    module.save_pretrained(tmp_path / "model")
    tokenizer(module).save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "pellucid",
        "workbench",
        str(tmp_path / "model"),
        "--no-browser",
        "--folder",
        str(tmp_path / "kept"),
    ]
    path = os.pathsep.join(filter(None, ["src", os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"workbench: (http://127\.0\.0\.1:\d+)/\?token=([\w-]{32})\n", line)
        assert found is not None, line
        with urllib.request.urlopen(f"{found[1]}/?token={found[2]}", timeout=30) as answer:
            assert b'id="workbench"' in answer.read()
        asked = urllib.request.Request(f"{found[1]}/api/models", headers={"X-Pellucid-Token": found[2]})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer)["models"][0]["name"] == "model"
            assert answer.headers["server"] is None
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode in (0, 130) and "Traceback" not in err
    assert found[2] not in out + err
