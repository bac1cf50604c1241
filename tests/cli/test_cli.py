"""The command line: one line and the right exit code for everything that goes wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

import pellucid
from pellucid.anatomy import loading
from pellucid.cli import app, main
from pellucid.errors import InputError, LoadError


@pytest.fixture
def pellucid_says(capsys):
    """Runs a command; returns its exit code and what it wrote to the two streams."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code, *capsys.readouterr()

    return run


@dataclass
class FakeAnatomy:
    def tree(self) -> str:
        return "layers " * 30

    def to_json(self) -> str:
        return json.dumps({"layers": 30})


@dataclass
class FakeModel:
    """Stands in for a loaded model: what it was opened with is all it knows."""

    source: str
    how: dict
    anatomy: FakeAnatomy = field(default_factory=FakeAnatomy)


@pytest.fixture
def fake(monkeypatch):
    """Replaces loading and the report by fakes; what the report is asked for lands in the returned list."""
    asked: list[tuple] = []

    def build(model, prompt, *, counterfactual, target, word):
        if not prompt:
            raise InputError("an empty prompt:\nnothing to explain")
        asked.append((model, prompt, counterfactual, target))
        return SimpleNamespace(html="<p>é</p>", findings=["Paris rises at layer 20"])

    module = ModuleType("pellucid.views.report")
    module.build = build
    monkeypatch.setitem(sys.modules, "pellucid.views.report", module)
    monkeypatch.setitem(vars(pellucid), "load", lambda source, **how: FakeModel(source, how))
    return asked


def test_anatomy_prints_the_tree_unbroken_into_a_pipe(pellucid_says, fake):
    code, out, err = pellucid_says("anatomy", "gpt2")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_anatomy_prints_json_alone(pellucid_says, fake):
    code, out, _ = pellucid_says("anatomy", "gpt2", "--json")
    assert code == 0
    assert json.loads(out) == {"layers": 30}


def test_report_writes_the_file_and_prints_what_it_found(pellucid_says, fake, tmp_path):
    file = tmp_path / "out.html"
    how = ["--task", "causal-lm", "--dtype", "float32", "--device", "cpu", "--revision", "main"]
    code, out, _ = pellucid_says("report", "gpt2", "A", "--counterfactual", "B", "--target", "C", "-o", str(file), *how)
    assert code == 0
    assert file.read_text(encoding="utf-8") == "<p>é</p>"
    assert out.splitlines() == [f"wrote {file}", "- Paris rises at layer 20"]
    model, *rest = fake[0]
    assert rest == ["A", "B", "C"]
    assert model.how == {
        "task": "causal-lm",
        "revision": "main",
        "dtype": "float32",
        "device": "cpu",
        "allow_pickle": False,
        "trust_remote_code": False,
    }


def test_an_unwritable_report_is_refused_before_any_work(pellucid_says, fake, tmp_path):
    code, _, err = pellucid_says("report", "gpt2", "A", "-o", str(tmp_path / "no" / "out.html"))
    assert code == 2
    assert "there is no directory" in err
    code, _, err = pellucid_says("report", "gpt2", "A", "-o", str(tmp_path))
    assert code == 2
    assert "it is a directory" in err
    assert fake == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["anatomy"], "Missing argument 'MODEL'"),
        (["anatomi", "gpt2"], "No such command 'anatomi'"),
        (["anatomy", "gpt2", "--jsn"], "--jsn"),
        (["anatomy", "gpt2", "--task", "poetry"], "poetry"),
        (["report", "gpt2", ""], "an empty prompt: nothing to explain"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(pellucid_says, fake, arguments, says):
    code, out, err = pellucid_says(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pellucid: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("verb", [["anatomy"], ["report", "a prompt"]])
def test_a_missing_model_is_one_line_and_exit_code_2(pellucid_says, verb, tmp_path):
    code, _, err = pellucid_says(verb[0], str(tmp_path / "absent"), *verb[1:])
    assert code == 2
    assert err.startswith("pellucid: no such file or directory")
    assert err.count("\n") == 1


def test_a_model_that_nobody_has_is_one_line_without_what_the_web_client_met(monkeypatch):
    """Also for whoever reads the traceback in Python: it has one exception, ours."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(LoadError, match="neither a directory here nor in the hub's cache") as raised:
        loading.read("nobody/nothing")
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    assert "Name or service not known" in str(raised.value) and "\n" not in str(raised.value)


def test_a_pickle_only_model_is_one_line_and_exit_code_2(pellucid_says, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    code, _, err = pellucid_says("anatomy", str(tmp_path))
    assert code == 2
    assert "safetensors" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("raised", "code"), [(RuntimeError("a bug"), 1), (KeyboardInterrupt(), 130)])
def test_a_bug_exits_with_1_and_an_interruption_with_130(pellucid_says, monkeypatch, raised, code):
    def fail(source: str, **how: object) -> None:
        raise raised

    monkeypatch.setitem(vars(pellucid), "load", fail)
    left, _, err = pellucid_says("anatomy", "gpt2")
    assert left == code
    assert "Traceback" not in err
    assert ("PELLUCID_DEBUG=1" in err) == (code == 1)


def test_debugging_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("PELLUCID_DEBUG", "1")
    with pytest.raises(InputError):
        main(["report", "gpt2", "A", "-o", str(tmp_path)])


def test_version_and_help_need_no_model(pellucid_says):
    assert pellucid_says("--version")[1] == f"pellucid {pellucid.__version__}\n"
    assert "anatomy" in pellucid_says()[1]


@pytest.mark.parametrize("verb", ["anatomy", "benchmark", "report"])
def test_every_verb_explains_itself(verb):
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert "MODEL" in shown.output
