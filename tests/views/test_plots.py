"""Every kind of view is drawn for paper: the numbers of the view, on the axes given, in vectors."""

from __future__ import annotations

import html
import io

import matplotlib
import numpy as np
import pytest
import xarray as xr

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import kinds, plot
from pellucid.views import schema as s
from pellucid.views.looking import pattern_of
from tests.views import gallery

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
EVERY = [*gallery.gallery(), gallery.document("Spoken", gallery.spoken())]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("shown", EVERY, ids=lambda d: d.title)
def test_every_view_is_drawn_on_the_axes_given(shown):
    ax = plt.figure().add_subplot()
    assert plot(shown, ax) is ax
    assert ax.get_title(loc="left").startswith(shown.title)
    assert ax.patches or ax.lines or ax.images or ax.texts
    file = io.BytesIO()
    ax.figure.savefig(file, format="svg")
    assert b"<path" in file.getvalue()


def test_dollars_of_prompts_are_no_formulas():
    """A title with two of them was set as a formula, or raised from within matplotlib where it is none."""
    title, words = r"costs $5 and \frac{ $x_{", ["$a$^{", r"\x$", "$y_{$"]
    grid = xr.DataArray(np.ones((3, 2)), {"token": words}, ("token", "head"), "effect")
    ax = plot(Result(grid, kind="ablation", title=title))
    file = io.BytesIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        ax.figure.savefig(file, format="svg")
    drawn = html.unescape(file.getvalue().decode())
    assert all(word in drawn for word in words) and "costs $5 and" in drawn and r"\$" not in drawn


def test_powers_on_a_logarithmic_axis_stay_powers():
    """The axes as `plot` leaves them: "$10^{2}$" is matplotlib's own label there."""
    ax = plot(gallery.document("Curves", gallery.curves()))
    ax.figure.canvas.draw()
    labels = [label for label in ax.get_xticklabels() if "$" in label.get_text()]
    assert ax.get_xscale() == "log" and labels and all(label.get_parse_math() for label in labels)


def test_every_kind_is_tried():
    assert {type(d.data) for d in EVERY} == {kind.schema for kind in kinds.KINDS}


def test_a_grid_shows_its_numbers_and_the_plane_that_is_chosen():
    data = gallery.heads()
    ax = plot(gallery.document("Heads", data))
    np.testing.assert_allclose(ax.images[0].get_array(), data.planes[0].values.array())
    low, high = ax.images[0].get_clim()
    assert (low == -high) == data.signed  # nothing has the colour of the paper
    with pytest.raises(InputError, match="no plane 'colour'"):
        plot(gallery.document("Heads", data), choice="colour")


def test_a_head_is_chosen_by_its_layer_and_number_and_a_packed_pattern_is_unpacked():
    data = gallery.attention()
    ax = plot(gallery.document("Heads", data), choice="4.5")
    np.testing.assert_allclose(ax.images[0].get_array(), data.stacks[0].pattern.array()[4 * 8 + 5])
    stack = gallery.long_attention(tuple(f"w{i}" for i in range(300)), 5, 9).stacks[0]
    rows, at = stack.rows, 0
    for head, counts in enumerate(rows.counts.array()[:2]):
        whole = pattern_of(stack, head)
        for query, count in enumerate(counts.tolist()):
            kept = slice(at, at + count)
            expected = np.zeros(len(stack.keys))
            expected[rows.keys.array()[kept]] = rows.weights.array()[kept]
            np.testing.assert_array_equal(whole[query], expected)
            at += count
    with pytest.raises(InputError, match=r"no head '9.9'.*layer\.head"):
        plot(gallery.document("Heads", data), choice="9.9")


def test_curves_keep_their_intervals():
    data = s.Curves(x=s.Ruler(name="layer"), y=s.Ruler(name="loss"), lines=(
        s.Line(name="a", x=s.Numbers.of([0, 1, 2]), y=s.Numbers.of([1.0, 2.0, 4.0]), low=s.Numbers.of([0.5, 1.0, 3.0]), high=s.Numbers.of([1.5, 3.0, 5.0])),
        s.Line(name="random", x=s.Numbers.of([0, 1, 2]), y=s.Numbers.of([0.0, 0.0, 0.0]), dashed=True),
    ))  # fmt: skip
    ax = plot(gallery.document("Curves", data))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2, 4], [0, 0, 0]]
    assert len(ax.collections) == 1 and ax.collections[0].get_datalim(ax.transData).y1 == 5
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "random"]


def test_a_result_plots_itself_and_a_table_without_numbers_says_what_to_do():
    import xarray as xr

    values = xr.DataArray([0.1, -2.0, 1.0], {"layer": [0, 1, 2]}, name="effect")
    assert Result(values, kind="ablation", title="Layers").plot().get_title(loc="left") == "Layers"
    words = s.Table(columns=(s.Column(name="word", texts=("a", "b")),), rows=2)
    with pytest.raises(InputError, match="no column of numbers"):
        plot(gallery.document("Words", words))
