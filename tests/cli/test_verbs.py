"""`lens`, `sweep`, `probe`, `circuit`, `show`, `doctor`: a file in, the numbers of the function and a file out."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

import pellucid
from pellucid import causal, lenses, metrics
from pellucid.cli import main
from pellucid.results import Result
from tests.engine.hand import opened


@pytest.fixture
def model():
    return opened("gpt2")


@pytest.fixture
def says(model, capsys, monkeypatch):
    monkeypatch.setitem(vars(pellucid), "load", lambda source, **how: model)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments)])
        return int(left.value.code or 0), *capsys.readouterr()

    return run


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


PAIRS = [
    {"prompt": f"Mary and {b} went to the city of {c}", "counterfactual": f"John and {b} went to the city of {c}", "target": " Paris", "against": " Rome"}
    for b in ("John", "Mary") for c in ("Paris", "Rome")
]  # fmt: skip


def test_a_lens_gives_the_functions_numbers_as_json_and_files(says, model, tmp_path):
    code, out, err = says(
        "lens", "tiny", "Mary is in Rome", "--target", " Paris", "--json", "-o", tmp_path / "lens.html"
    )
    assert (code, err) == (0, "")
    saved = Result.load(tmp_path / "lens.zip")
    alone = lenses.logit_lens(model, "Mary is in Rome", targets=[" Paris"])
    np.testing.assert_array_equal(saved.values, alone.values)
    assert len(json.loads(out)["rows"]) == alone.to_frame().shape[0]
    assert "data-pellucid" in (tmp_path / "lens.html").read_text(encoding="utf-8")


def test_a_sweep_is_ablation_over_the_prompts_of_a_file(says, model, tmp_path):
    data = written(tmp_path / "prompts.jsonl", PAIRS)
    code, out, err = says("sweep", "tiny", data, "--json", "-o", tmp_path / "heads.zip")
    assert (code, err) == (0, "")
    metric = metrics.logit_difference([p["target"] for p in PAIRS], [p["against"] for p in PAIRS])
    alone = causal.ablation(model, [p["prompt"] for p in PAIRS], metric=metric)
    np.testing.assert_allclose(Result.load(tmp_path / "heads.zip").values, alone.values, atol=1e-6)
    assert {row["head"] for row in json.loads(out)["rows"]} == set(alone["head"].values.tolist())


def test_a_probe_stands_beside_a_model_that_learnt_nothing(says, tmp_path):
    rows = [
        {"text": f"{'Mary' if i % 2 else 'John'} went to the city {i // 4}", "label": bool(i % 2)} for i in range(24)
    ]
    code, out, err = says("probe", "tiny", written(tmp_path / "names.jsonl", rows), "--pool", "first", "--json")
    assert (code, err) == (0, "")
    assert {"accuracy", "random", "majority", "gain"} <= json.loads(out)["rows"][0].keys()
    rows = [{**row, "label": float(i)} for i, row in enumerate(rows)]
    code, out, err = says("probe", "tiny", written(tmp_path / "numbers.jsonl", rows), "--json")
    assert code == 0 and "r2" in json.loads(out)["rows"][0]


def test_a_circuit_is_found_on_some_pairs_and_judged_on_others(says, model, tmp_path):
    page = tmp_path / "c.html"
    code, out, err = says(
        "circuit", "tiny", written(tmp_path / "pairs.jsonl", PAIRS), "--method", "eap", "--faithful", 0.0, "-o", page
    )
    assert code == 0, err
    assert "found on 2 pairs, judged on 2 others" in out
    from pellucid.circuits import Circuit

    assert len(Circuit.load(tmp_path / "c.circuit.zip")) > 0 and page.exists()
    assert Result.load(tmp_path / "c.zip").kind
    code, _, err = says("circuit", "tiny", written(tmp_path / "one.jsonl", PAIRS[:1]), "-o", page)
    assert code == 2 and "too few" in err


def test_a_saved_result_is_shown_printed_and_programmed(says, model, tmp_path):
    file = lenses.logit_lens(model, "Mary is in Rome").save(tmp_path / "lens.zip")
    code, out, _ = says("show", file, "-o", tmp_path / "lens.html")
    assert code == 0 and "logit_lens" in out and (tmp_path / "lens.html").exists()
    code, out, _ = says("show", file, "--code")
    assert code == 0 and "pl.lenses.logit_lens(model, 'Mary is in Rome')" in out
    code, _, err = says("show", tmp_path / "nothing.zip")
    assert code == 2 and len(err.splitlines()) == 1


def test_the_doctor_knows_versions_machine_and_what_is_lacking(says, monkeypatch):
    doctor = importlib.import_module("pellucid.cli.doctor")  # the package holds the verb of that name
    code, out, _ = says("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] and found["extras"]["gguf"] == "ready"
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "gguf")
    assert doctor.examined()["extras"]["gguf"] == "lacks gguf: pip install 'pellucid[gguf]'"
    assert "memory" in says("doctor")[1]


@pytest.mark.parametrize(
    ("verb", "rows", "said"),
    [
        ("sweep", [{"prompt": "Mary"}], "line 1: expected a JSON object with prompt, target"),
        ("sweep", [PAIRS[0], {"prompt": "Mary", "target": " Paris"}], "row 2 has no 'against'"),
        ("probe", [], "no lines"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(says, tmp_path, verb, rows, said):
    code, _, err = says(verb, "tiny", written(tmp_path / "rows.jsonl", rows))
    assert code == 2 and said in err and len(err.splitlines()) == 1
    code, _, err = says(verb, "tiny", tmp_path / "rows.jsonl", "-o", tmp_path / "out.txt")
    assert code == 2 and "ends in .html or .zip" in err
