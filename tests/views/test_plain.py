"""Where no script may run, every view still says its strongest numbers; a widget leaves its cell a view without a kernel."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pellucid.errors import InputError
from pellucid.views import schema as s
from pellucid.views import widgets
from pellucid.views.cells import ROWS
from pellucid.views.hosts import element
from pellucid.views.plain import plain
from pellucid.views.schema import Document, Grid
from tests.views import gallery


@pytest.mark.parametrize("shown", [*gallery.gallery(), gallery.document("s", gallery.spoken())], ids=lambda d: d.title)
def test_every_view_has_a_short_table_that_needs_no_script(shown: Document) -> None:
    text = plain(shown)
    rows = text.count("<tr>") - 1
    assert 2 <= rows <= ROWS
    assert shown.title in text and "<script" not in text
    assert text in element(shown)


def test_the_table_holds_the_strongest_numbers_the_strongest_first() -> None:
    shown = gallery.document("Heads", gallery.heads())
    assert isinstance(shown.data, Grid)
    values = shown.data.planes[0].values.array()
    cells = re.findall(r"<td>([^<]*)</td>", plain(shown))
    rows = [cells[i : i + 3] for i in range(0, len(cells), 3)]
    told = [float(row[2]) for row in rows]
    np.testing.assert_allclose(np.abs(told), np.sort(np.abs(values), axis=None)[::-1][:ROWS], rtol=1e-3)
    assert values[int(rows[0][0]), int(rows[0][1])] == pytest.approx(told[0], rel=1e-3)
    assert f"The strongest {ROWS} of {values.size}." in plain(shown)


def test_a_long_pattern_tells_the_same_keys_as_its_rows_hold() -> None:
    texts = tuple(f"w{i}" for i in range(300))
    shown = gallery.document("Long", gallery.long_attention(texts, 5, 9))
    stack = shown.data.stacks[0]  # type: ignore[union-attr]
    assert stack.rows is not None
    first = re.findall(r"<td>([^<]*)</td>", plain(shown))[:4]
    assert first[1:3] == ["w299", "w0"] and float(first[3]) == pytest.approx(0.6, abs=0.01)


def test_what_tokens_contain_stays_text() -> None:
    for shown in gallery.nasty():
        assert "<script" not in plain(shown) and "<img" not in plain(shown)


def test_a_widget_shows_a_view_that_outlives_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []

    class AnyWidget:
        def __init__(self, **values: str) -> None:
            self.__dict__.update(values)

        def _repr_mimebundle_(self) -> tuple[dict[str, str], dict[str, str]]:
            return {"application/vnd.jupyter.widget-view+json": "x", "text/plain": "y"}, {}

    trait = SimpleNamespace(tag=lambda sync: None)
    modules = {
        "anywidget": {"AnyWidget": AnyWidget},
        "traitlets": {"Unicode": lambda *_: trait, "Int": lambda *_: trait},
        "IPython.display": {"display": lambda data, **_: told.append(data)},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    widgets._kind.cache_clear()
    shown = widgets.widget(gallery.document("Heads", gallery.heads()))
    shown._ipython_display_()
    widgets._kind.cache_clear()
    kept, live = told
    assert f'data-pellucid-instead="{shown.instead}"' in kept["text/html"] and "data-pellucid>" in kept["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in live and "text/html" not in live
    assert live["text/plain"] == kept["text/plain"] == "<Document 'Heads': grid>"


def test_without_anywidget_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    widgets._kind.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'pellucid\[notebook\]'"):
        widgets.widget(gallery.document("Heads", gallery.heads()))


def test_what_is_empty_is_a_title_without_a_table() -> None:
    none = s.Numbers.of(np.zeros(0))
    whole = s.Numbers.of(np.zeros(0, int))
    for data in (
        s.Table(columns=(), rows=0),
        s.Circuit(nodes=(), sources=whole, targets=whole, ports=(), scores=none),
        s.Curves(x=s.Ruler(name="x"), y=s.Ruler(name="y"), lines=(s.Line(name="a", x=none, y=none),)),
        s.Anatomy(model="m", stacks=(), proofs=()),
        s.Neuron(component="layers.0.mlp.neurons.1", contexts=()),
    ):
        assert "<table" not in plain(Document(title="T", data=data)), type(data).__name__
    missing = s.Plane(name="p", values=s.Numbers.of(np.full((2, 2), np.nan)))
    axis = s.Axis(name="a", labels=("0", "1"))
    assert "<table" not in plain(Document(title="T", data=s.Grid(rows=axis, columns=axis, planes=(missing,), unit="u")))
