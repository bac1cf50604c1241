"""`pellucid benchmark` prints a table and the sentence, writes a page, and goes on where it stopped."""

from __future__ import annotations

import json

import pytest

import pellucid
from pellucid.cli import main
from pellucid.results import Result
from tests.attribution.evaluation.models import TEXTS, opened


@pytest.fixture
def says(capsys, monkeypatch):
    """Runs the command on a tiny model; returns its exit code and what it wrote."""
    model = opened("gpt2")  # which calls `load` itself
    monkeypatch.setitem(vars(pellucid), "load", lambda source, **how: model)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["benchmark", "tiny", *map(str, arguments)])
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"text": text, "target": " Paris", "rationale": [text.split()[0]]} for text in TEXTS[:6]]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_it_prints_a_table_and_which_method_to_prefer_and_writes_a_page(says, data, tmp_path):
    page = tmp_path / "out.html"
    code, out, err = says("--data", data, "--methods", "occlusion, gradient_x_input", "-o", page)
    assert (code, err) == (0, "")
    for word in (
        "occlusion",
        "gradient_x_input",
        "random",
        "faithfulness ↑",
        "sufficiency ↓",
        "AUPRC",
        "forward passes",
    ):
        assert word in out
    sentence = Result.load(page.with_suffix(".zip")).data.attrs["sentence"]
    assert sentence in out
    assert sentence.replace("'", "&#x27;") in page.read_text(encoding="utf-8")
    rows = page.with_suffix(".jsonl").read_text().splitlines()
    assert len(rows) == 1 + 6 * 3


def test_a_second_call_goes_on_with_the_rows_of_the_first(says, data, tmp_path, monkeypatch):
    page, rows = tmp_path / "out.html", tmp_path / "kept.jsonl"
    first = says("--data", data, "--methods", "occlusion", "--rows", rows, "-o", page)
    kept = rows.read_text().splitlines()
    rows.write_text("\n".join(kept[:8]) + "\n")
    again = says("--data", data, "--methods", "occlusion", "--rows", rows, "-o", page)
    assert again[1] == first[1]
    resumed = [json.loads(line) for line in rows.read_text().splitlines()]
    for new, old in zip(resumed[1:], map(json.loads, kept[1:]), strict=True):
        assert (new["example"], new["method"]) == (old["example"], old["method"])
        assert new["values"] == pytest.approx(old["values"], abs=1e-5)


@pytest.mark.parametrize("replacement", ["resample", "remove"])
def test_tokens_are_taken_away_as_asked(says, data, tmp_path, replacement):
    code, _, _ = says("--data", data, "--methods", "occlusion", "--replacement", replacement, "-o", tmp_path / "o.html")
    assert code == 0
    assert replacement in (tmp_path / "o.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.jsonl"], "there is no data at 'absent.jsonl'"),
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--players", "letters"], "unknown players 'letters'"),
        (["-o", "absent/out.html"], "name a file in a directory that exists"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(says, data, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--data" in arguments else ["--data", data, *arguments]
    code, out, err = says(*given)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
