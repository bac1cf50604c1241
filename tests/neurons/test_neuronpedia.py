"""What is exported is what plain runs give: activations token by token, densities, words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.neurons import Units, export_neuronpedia, harvest, logit_effects
from pellucid.neurons.dictionaries import Dictionary, ReLU
from pellucid.tasks.tokens import texts
from tests.neurons.test_harvest import TEXTS
from tests.neurons.test_neuron_page import opened

SITE = "layers.1.mlp.neurons"


def test_a_file_of_neurons_holds_what_runs_give(tmp_path: Path) -> None:
    model = opened("llama")
    found = harvest(model, TEXTS, [SITE], top=16, sample=64)
    units = [f"{SITE}.{n}" for n in (3, 0, 5)]
    (file,) = export_neuronpedia(
        model, found, units, tmp_path, name="tiny", source="1-mlp", window=(200, 200), descriptions={units[1]: "cats"}
    )
    made = json.loads(file.read_text())
    assert (made["modelId"], made["source"], [f["index"] for f in made["features"]]) == ("tiny", "1-mlp", [3, 0, 5])
    assert [f["explanations"] for f in made["features"]] == [
        [], [{"text": "cats", "methodName": "pellucid", "modelName": ""}], []]  # fmt: skip
    runs = []
    for text in TEXTS:
        run = model.run(text, keep=[SITE])
        stream = run.inputs.stream("")
        runs.append((texts(model.tokenizer, stream.ids[0].numpy()).tolist(), run.tensor(SITE)[0].detach()))
    for feature in made["features"]:
        n = feature["index"]
        assert feature["activations"]
        for shown in feature["activations"]:
            assert len(shown["tokens"]) == len(shown["values"])
            match = [x[:, n] for tokens, x in runs if tokens == shown["tokens"]]
            assert match and any(torch.allclose(x, torch.tensor(shown["values"]), atol=1e-3) for x in match)
            assert shown["quantileMin"] <= shown["quantileMax"] and 0 <= shown["quantileFraction"] <= 1
        best = max(float(x[found.plan.skip :, n].max()) for _, x in runs)
        assert feature["activations"][0]["quantileMax"] == pytest.approx(best, abs=1e-4)
        effects = logit_effects(model, f"{SITE}.{n}", top=10).data.isel(unit=0)
        assert [w["token"] for w in feature["topLogits"]] == effects.raised_token.values.tolist()
        assert [w["value"] for w in feature["bottomLogits"]] == pytest.approx(effects.lowered.values, abs=1e-4)


def test_features_of_a_dictionary_and_many_units_in_batches(tmp_path: Path) -> None:
    model = opened("llama")
    encoder = torch.randn(32, 150, generator=torch.Generator().manual_seed(0))
    d = Dictionary(encoder, torch.zeros(150), encoder.T.contiguous(), torch.zeros(32), ReLU(), "layers.0.resid_post")
    found = harvest(model, TEXTS, [Units("layers.0.resid_post", d, name="features")], top=4, sample=32)
    files = export_neuronpedia(
        model, found, [f"features.{n}" for n in range(150)], tmp_path, name="m", source="s", contexts=2, each=1, top=3
    )
    made = [json.loads(f.read_text())["features"] for f in files]
    assert [f.name for f in files] == ["batch-0.json", "batch-1.json"] and [len(m) for m in made] == [128, 22]
    top = logit_effects(model, {"7": d.direction(7)}, top=3).data.raised_token.values[0].tolist()
    assert [w["token"] for w in made[0][7]["topLogits"]] == top
    assert made[0][7]["density"] == pytest.approx(float(found.positive("features")[7]))
    own = harvest(model, TEXTS, [Units("layers.0.resid_post", torch.ones(32), name="axis")], top=4, sample=32)
    (file,) = export_neuronpedia(model, own, "axis.0", tmp_path / "axis", name="m", source="s")  # type: ignore[arg-type]
    assert json.loads(file.read_text())["features"][0]["topLogits"] is None


def test_units_of_two_sites_or_of_nothing_are_refused(tmp_path: Path) -> None:
    model = opened("llama")
    found = harvest(model, TEXTS, ["layers.*.mlp.neurons"], top=4, sample=16)
    for units, what in [
        (["layers.0.mlp.neurons.1", f"{SITE}.1"], "2 sites"),
        ([], "expected"),
        ([f"{SITE}.9999"], "no unit"),
    ]:
        with pytest.raises(InputError, match=what):
            export_neuronpedia(model, found, units, tmp_path / "x", name="m", source="s")
        assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="weights"):
        export_neuronpedia(pl.controls.shuffled(model, 0), found, [f"{SITE}.1"], tmp_path, name="m", source="s")
