"""Every result has a document; the document holds its numbers, and nothing in it can break out of the page."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import pellucid as pl
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import kinds
from pellucid.views import schema as s
from pellucid.views.documents import document
from pellucid.views.hosts import bundle, output, page
from tests.views import gallery
from tests.zoo import build as tiny
from tests.zoo import tokenizer

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llama() -> pl.Model:
    module = tiny("llama")
    return pl.load(module, tokenizer=tokenizer(module))


# ---- the schema


def test_the_typescript_types_are_those_of_the_schema() -> None:
    subprocess.run(
        [sys.executable, "scripts/view_types.py", "--check"],
        cwd=ROOT,
        check=True,
        env={"PYTHONPATH": "src", "PATH": ""},
    )


@pytest.mark.parametrize("shown", gallery.gallery(), ids=lambda d: type(d.data).__name__)
def test_a_document_read_back_is_the_same(shown: s.Document) -> None:
    text = shown.json()
    assert json.loads(text)["pellucid-view"] == s.VERSION
    assert s.Document.read(text) == shown


def test_a_document_of_another_version_or_form_is_refused() -> None:
    found = json.loads(gallery.gallery()[0].json())
    for broken in ({**found, "pellucid-view": 2}, {**found, "extra": 1}, {**found, "data": {"kind": "nothing"}}):
        with pytest.raises(InputError, match="no view of version 1"):
            s.Document.read(json.dumps(broken))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_numbers_survive_the_way_through_json(dtype: str) -> None:
    given = np.array([[0, 1, 2], [3, 4, 1]]).astype(dtype)
    np.testing.assert_array_equal(s.Numbers.of(given).array(), given)
    assert np.isnan(s.Numbers.of([np.nan]).array()[0])


def test_no_text_can_end_the_script_it_stands_in() -> None:
    for shown in gallery.nasty():
        assert not re.search(r"[<>&\u2028\u2029]", shown.json())
    whole = page(*gallery.nasty(), title="</title><script>alert(1)</script>")
    assert whole.count("<script") == len(gallery.nasty()) + 1
    assert "<script>alert" not in whole


# ---- results of the methods that exist


def test_a_logit_lens_is_a_lens_with_its_words_and_targets(llama: pl.Model) -> None:
    found = pl.lenses.logit_lens(llama, PROMPT, top=3, targets=[" the"])
    data = document(found).data
    assert isinstance(data, s.Lens)
    reading = data.readings[0]
    words = np.array(data.words)[reading.top.array()]
    np.testing.assert_array_equal(words, found["top_token"].values)
    np.testing.assert_allclose(reading.probability.array(), found["probability"].values, atol=1e-6)
    np.testing.assert_allclose(reading.followed[0].rank.array(), found["target_rank"].values[..., 0])
    assert data.components[0] == "embed" and data.components[1] == "layers.0.resid_post"


def test_direct_logit_attribution_is_a_waterfall_that_adds_up(llama: pl.Model) -> None:
    data = document(pl.lenses.direct_logit_attribution(llama, PROMPT, by="head")).data
    assert isinstance(data, s.Contributions)
    assert data.values.array().sum() == pytest.approx(data.total, abs=1e-3)
    assert any(re.fullmatch(r"layers\.\d+\.attn\.heads\.\d+", c) for c in data.components)
    assert not any("z_out" in c for c in data.components)


def test_effects_of_heads_and_of_positions_are_grids_that_know_their_components(llama: pl.Model) -> None:
    metric = pl.metrics.logit_difference(" the", " of")
    heads = document(pl.causal.ablation(llama, PROMPT, over="layers.*.attn.heads.*", metric=metric)).data
    assert isinstance(heads, s.Grid) and heads.planes[0].component == "layers.{row}.attn.heads.{column}"
    places = document(
        pl.causal.patching(llama, PROMPT, "The capital of Italy is", over="layers.*.resid_pre@*", metric=metric)
    ).data
    assert isinstance(places, s.Grid) and places.planes[0].component == "layers.{row}.resid_pre"
    assert places.columns.positions == tuple(range(len(places.columns.labels)))
    clean, corrupted = places.prompts
    assert clean == places.columns.labels and [i for i, t in enumerate(clean) if corrupted[i] != t] == [3]
    both = pl.causal.patching(llama, PROMPT, "The capital of Italy is", over="layers.*.attn.heads.*", metric=metric)
    by_head = document(both).data
    assert isinstance(by_head, s.Grid) and by_head.prompts == places.prompts
    assert by_head.planes[0].component == "layers.{row}.attn.heads.{column}"


def test_the_map_of_a_model_shows_every_layer_and_proof(llama: pl.Model) -> None:
    data = document(llama).data
    assert isinstance(data, s.Anatomy)
    assert sum(len(b.layers) for b in data.stacks[0].blocks) == len(llama.anatomy.stacks[0].blocks)
    assert [p.name for p in data.proofs] == [p.name for p in llama.anatomy.proofs]


# ---- results that have only the shape of others


def result(dims: dict[str, object], kind: str = "new", **more: object) -> Result:
    shape = [len(v) for v in dims.values()]  # type: ignore[arg-type]
    values = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    return Result(xr.DataArray(values, dims, tuple(dims), name="value"), kind=kind, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        ({"layer": range(3), "head": range(2)}, s.Grid),
        ({"part": ["attn.out", "mlp.out"], "layer": range(3), "position": range(4)}, s.Grid),
        ({"window": [1, 2], "layer": range(5)}, s.Curves),
        ({"layer": range(6)}, s.Curves),
        ({"size": [0.01, 0.1, 1.0]}, s.Curves),
        ({"layer": range(2), "head": range(2), "query": range(3), "key": range(3)}, s.Attention),
        ({"layer": range(2), "query": range(3), "key": range(3)}, s.Attention),
        ({"word": ["a", "b", "c"]}, s.Table),
        ({"a": range(2), "b": range(2), "c": range(2), "d": range(2)}, s.Table),
        ({}, s.Table),
    ],
)
def test_a_method_that_views_never_heard_of_is_shown_by_its_dimensions(dims: dict[str, object], kind: type) -> None:
    assert isinstance(document(result(dims)).data, kind)


def test_planes_are_the_parts_and_carry_their_sites() -> None:
    data = document(result({"part": ["attn.out", "mlp.out"], "layer": range(3), "position": range(4)})).data
    assert isinstance(data, s.Grid)
    assert [(p.name, p.component) for p in data.planes] == [
        ("attn.out", "layers.{row}.attn.out"),
        ("mlp.out", "layers.{row}.mlp.out"),
    ]
    np.testing.assert_allclose(data.planes[1].values.array(), np.linspace(-1, 1, 24).reshape(2, 3, 4)[1], atol=1e-6)


def test_of_several_prompts_the_view_says_which_it_shows(llama: pl.Model) -> None:
    found = pl.lenses.logit_lens(llama, [PROMPT, "The capital of Italy is"], top=2)
    shown = document(found)
    assert "first of 2 prompts" in shown.lead
    assert isinstance(shown.data, s.Lens) and shown.data.readings[0].top.shape[0] == len(shown.data.layers)
    assert document(found.sel(prompt=1)).lead == ""
    mean = document(pl.lenses.direct_logit_attribution(llama, [PROMPT, "The capital of Italy is"], " the"))
    assert "mean over 2 prompts" in mean.lead


def test_the_public_names_stay_functions_however_often_they_are_asked_for() -> None:

    for name in pl.views.__all__:
        assert callable(getattr(pl.views, name)) and callable(getattr(pl.views, name)), name


def test_a_kind_of_view_is_one_row_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up kind, added in one place, is chosen, sent, read back, told in plain words, and known by name."""

    class Dial(s.Shown, frozen=True):
        amount: float

    row = kinds.Kind(
        Dial,
        lambda shown: (("amount",), [(shown.amount,)], 1),
        lambda shown, ax, choice: None,
        lambda given: given.kind == "dial",
        lambda given: Dial(amount=float(given.values)),
    )
    monkeypatch.setattr(kinds, "KINDS", [row, *kinds.KINDS])
    found = Result(xr.DataArray(0.5), kind="dial")
    shown = document(found)
    assert json.loads(shown.json())["data"] == {"kind": "dial", "amount": 0.5}
    assert s.Document.read(shown.json()) == shown and repr(shown) == "<Document 'dial': dial>"
    assert "<td>0.5</td>" in output(found)
    with pytest.raises(
        InputError, match="'a' dial, 'b' dial; what can, several of one kind, are lens, attention, tokens, curves, grid"
    ):
        pl.views.compare({"a": found, "b": found})
    monkeypatch.undo()
    assert isinstance(document(found).data, s.Table)


def test_what_enters_the_first_layer_goes_by_its_name_though_layers_are_numbers() -> None:
    data = document(result({"layer": [-1, 0, 1], "head": [0, 1]})).data
    assert isinstance(data, s.Grid) and data.rows.labels == ("embed", "0", "1")


def test_what_is_no_finding_has_no_view() -> None:
    with pytest.raises(InputError, match="a list has no view"):
        document([1, 2])


# ---- hosts


def test_a_result_saves_itself_as_one_offline_file(tmp_path: Path) -> None:
    found = result({"layer": range(3), "head": range(2)}, title="Effects")
    path = found.save_html(tmp_path / "a.html", found)
    text = path.read_text()
    assert text.count("data-pellucid>") == 2 and "default-src" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?https?:""", text)
    with pytest.raises(InputError, match="cannot write"):
        found.save_html(tmp_path / "missing" / "a.html")


def test_a_notebook_output_carries_all_it_needs_and_a_plain_form() -> None:
    html = result({"word": ["a", "b"]}, title="T")._repr_html_()
    assert "data-pellucid" in html and "DecompressionStream" in html and "<table>" in html
    assert len(html) < 120_000
    assert output(result({})).count("<script") == 2


def test_a_notebook_that_is_not_trusted_shows_a_picture(llama: pl.Model) -> None:
    """Jupyter takes scripts out of it, and leaves an image with its data where it is."""
    pytest.importorskip("matplotlib")
    found = pl.causal.ablation(
        llama, PROMPT, over="layers.*.mlp.out", metric=pl.metrics.logit_difference(" the", " of")
    )
    picture = re.search(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', found._repr_html_())
    assert picture and base64.b64decode(picture[1]).startswith(b"\x89PNG") and picture[2] == found.title
    assert "<img" not in page(found)  # a file has its script


def test_the_code_corner_is_the_recorded_call_and_gives_the_numbers_again(llama: pl.Model) -> None:
    metric = pl.metrics.logit_difference(" the", " of")
    found = pl.causal.ablation(llama, PROMPT, over="layers.*.mlp.out", metric=metric)
    python = document(found).code.python
    assert "pl.causal.ablation(model, 'The capital of France is', over='layers.*.mlp.out', metric=pl.metrics." in python
    given = {"module": llama.module, "tokenizer": llama.tokenizer}
    exec(python, given)
    np.testing.assert_allclose(given["result"].values, found.values, atol=1e-6)
    assert document(result({"layer": range(3)})).code.python == ""


def test_effect_and_share_are_planes_with_a_scale_each(llama: pl.Model) -> None:
    metric = pl.metrics.logit_difference(" the", " of")
    found = pl.causal.patching(llama, PROMPT, "The capital of Italy is", over="layers.*.resid_pre@*", metric=metric)
    data = document(found).data
    assert isinstance(data, s.Grid) and data.signed
    assert [(p.name, p.unit or data.unit) for p in data.planes] == [("effect", "effect"), ("share", "share")]
    np.testing.assert_allclose(data.planes[1].values.array(), found["share"].values, atol=1e-6)


def test_the_bundle_is_small() -> None:
    import gzip

    assert len(gzip.compress(bundle().encode(), 9)) < 60_000


def test_a_circuit_is_a_graph_with_every_edge_and_its_ports(llama: pl.Model) -> None:
    whole = pl.circuits.Circuit.whole(pl.circuits.wire(llama).graph)
    data = document(whole).data
    assert isinstance(data, s.Circuit)
    assert len(data.ports) >= len(whole) and {"q", "k", "v"} < set(data.ports)
    assert data.nodes[0].type == "embed" and data.nodes[-1].type == "logits"
    layers = np.array([n.layer for n in data.nodes])
    assert (layers[data.sources.array()] <= layers[data.targets.array()]).all()
