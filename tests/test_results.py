"""A result keeps, selects, compares, shows and saves what a method found, and says where it came from."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pellucid.errors import InputError
from pellucid.results import Provenance, Result, plain


@pytest.fixture
def result() -> Result:
    data = xr.Dataset(
        {
            "effect": (("layer", "token"), [[0.5, -3.0, np.nan], [2.0, 0.25, 1.0]], {"units": "nats"}),
            "kept": ("layer", [True, False]),
        },
        {"layer": [4, 7], "token": [" Paris", "[b]", "<s>\n"], "name": ("token", ["IO", "", "end"])},
        {"note": "a test", "shape": (2, 3)},
    )
    provenance = Provenance("patching", "gpt2", "main", "0123456789abcdef", {"prompt": "Hi"}, {"n": 3}, seed=7)
    return Result(data, kind="patching", title="Patching", provenance=provenance)


# -- provenance -------------------------------------------------------------------------------------------


def test_provenance_survives_json() -> None:
    arguments = {
        "layers": (1, 2),
        "path": Path("a/b"),
        "nan": float("nan"),
        "x": np.float32(0.5),
        "e": np.zeros((2, 3)),
    }
    provenance = Provenance("lens", "gpt2", seed=1, inputs=["a", "b"], arguments=arguments)
    assert Provenance.from_json(provenance.to_json()) == provenance
    assert json.loads(provenance.to_json())["arguments"] == {
        "layers": [1, 2], "path": "a/b", "nan": "nan", "x": 0.5, "e": "float64[2, 3]",
    }  # fmt: skip
    assert provenance.versions["torch"]
    assert provenance.created.endswith("+00:00")


def test_plain_describes_tensors_without_keeping_them() -> None:
    import torch

    assert plain({"v": torch.zeros(3, 768), "s": {2, 1}, "f": float("-inf"), 1: None}) == {
        "v": "float32[3, 768]", "s": [1, 2], "f": "-inf", "1": None,
    }  # fmt: skip


# -- reading ----------------------------------------------------------------------------------------------


def test_variables_and_coordinates_are_attributes_and_items(result: Result) -> None:
    assert result.kept.values.tolist() == result["kept"].values.tolist() == [True, False]
    assert result.token.values[0] == " Paris"
    assert result.values is result.effect.values
    assert {"effect", "kept", "layer"} <= set(dir(result))
    with pytest.raises(InputError, match="no 'efect'; did you mean 'effect'"):
        result["efect"]
    with pytest.raises(AttributeError, match="did you mean 'effect'"):
        result.efect  # noqa: B018


def test_sel_keeps_everything_else(result: Result) -> None:
    part = result.sel(layer=7, token=["[b]", " Paris"])
    assert part.values.tolist() == [0.25, 2.0]
    assert (part.kind, part.title, part.provenance) == (result.kind, result.title, result.provenance)
    with pytest.raises(InputError, match=r"no dimension 'layers' in this result; did you mean 'layer'"):
        result.sel(layers=4)
    with pytest.raises(InputError, match=r"no {'layer': 5} in this result, whose labels begin {'layer': \[4, 7\]}"):
        result.sel(layer=5)


def test_the_frame_is_tidy(result: Result) -> None:
    frame = result.to_frame()
    assert len(frame) == 6
    assert {"layer", "token", "effect", "kept", "name"} == set(frame.columns)
    row = frame[(frame.layer == 7) & (frame.token == "[b]")].iloc[0]
    assert (row.effect, row.kept) == (0.25, False)
    assert result.to_frame("kept").kept.tolist() == [True, False]
    assert result.sel(layer=4, token="[b]").to_frame().effect.tolist() == [-3.0]


def test_variables_without_a_common_table_must_be_named() -> None:
    result = Result(xr.Dataset({"a": ("x", [1, 2]), "b": ("y", [3])}), kind="k")
    assert result.to_frame().columns.tolist() == ["x", "a"]
    with pytest.raises(InputError, match="name those you want"):
        result.to_frame("a", "b")
    assert result.to_frame("b").b.tolist() == [3]
    assert "a" in repr(result)


def test_top_gives_the_largest_cells_first_and_nan_last(result: Result) -> None:
    assert result.top(3).effect.tolist() == [-3.0, 2.0, 1.0]
    assert result.top(3).kept.tolist() == [True, False, False]
    assert np.isnan(result.top(99).effect.tolist()[-1])
    assert result.top(0).empty
    words = Result(xr.DataArray(["b", "a", "c"], dims="rank", name="word"), kind="lens")
    assert words.top(2).to_dict("list") == {"rank": [0, 1], "word": ["b", "a"]}


@given(
    values=arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-9, 9)),
    n=st.integers(1, 30),
)
@settings(deadline=None, max_examples=40)
def test_top_equals_sorting_the_whole_frame(values: np.ndarray, n: int) -> None:
    top = Result(xr.DataArray(values, dims=("a", "b"), name="v"), kind="k").top(n)
    assert np.abs(top.v).tolist() == sorted(np.abs(values).ravel().tolist(), reverse=True)[:n]
    assert all(values[row.a, row.b] == row.v for row in top.itertuples())


# -- comparing --------------------------------------------------------------------------------------------


def test_equality_covers_data_labels_and_provenance_but_not_the_time(result: Result) -> None:
    def twin(**changed: object) -> Result:
        provenance = Provenance.from_json(json.dumps(json.loads(result.provenance.to_json()) | changed))
        return Result(result.data, kind="patching", title="Patching", provenance=provenance)

    assert result == twin(created="2001-01-01T00:00:00+00:00")
    assert result.equals(twin())
    assert result != twin(seed=8)
    assert result != Result(result.data * 2, kind="patching", title="Patching", provenance=result.provenance)
    assert result != Result(result.data, kind="ablation", title="Patching", provenance=result.provenance)
    assert result != "patching"


def test_allclose_compares_numbers_within_a_tolerance_and_labels_exactly(result: Result) -> None:
    def changed(**data: xr.DataArray) -> Result:
        return Result(result.data.assign(data), kind="other")

    assert result.allclose(changed(effect=result.effect + 1e-7))
    assert not result.allclose(changed(effect=result.effect + 1e-3))
    assert result.allclose(changed(effect=result.effect + 1e-3), atol=1e-2)
    assert not result.allclose(Result(result.data.assign_coords(layer=[4, 8]), kind="other"))
    words = Result(xr.DataArray(["a", "b"], dims="x"), kind="k")
    assert words.allclose(words)


def test_results_can_be_copied_and_pickled(result: Result) -> None:
    assert copy.deepcopy(result) == pickle.loads(pickle.dumps(result)) == result


def test_the_data_given_is_left_as_it_was() -> None:
    data = xr.Dataset({"a": ("x", [1.0], {"range": (0, 1)})}, attrs={"pair": (1, 2)})
    assert Result(data, kind="k").data.attrs == {"pair": [1, 2]}
    assert (data.attrs, data.a.attrs) == ({"pair": (1, 2)}, {"range": (0, 1)})
    with pytest.raises(InputError, match="at least one variable"):
        Result(xr.Dataset(), kind="k")


# -- showing ----------------------------------------------------------------------------------------------


def test_the_terminal_view_has_title_cells_and_origin(result: Result) -> None:
    title, heading, columns, _, second, *_, source = repr(result).splitlines()
    assert title == "Patching"
    assert heading == "patching: effect, kept over layer 2, token 3"
    assert columns.split() == ["layer", "token", "name", "effect", "kept"]
    assert second.split() == ["4", "[b]", "''", "-3", "True"]  # in the table's own order, not taken for markup
    assert source.startswith("patching · gpt2@main · weights 0123456789ab · seed 7")
    assert "' Paris'" in repr(result)
    assert "'<s>\\n'" in repr(result)


def test_a_large_table_shows_what_is_largest_and_says_so() -> None:
    values = np.where(np.arange(20) % 2, -1.0, 1.0) * np.arange(20)
    result = Result(xr.DataArray(values, {"layer": np.arange(20)}, name="effect"), kind="k")
    lines = repr(result).splitlines()
    assert "the 8 largest of 20" in lines[1]
    assert [line.split()[0] for line in lines[3:11]] == [str(layer) for layer in range(19, 11, -1)]


def test_per_prompt_values_and_constants_do_not_repeat_in_the_table_of_the_main_variable() -> None:
    data = xr.Dataset(
        {
            "effect": ("layer", [1.0, 2.0]),
            "value": (("layer", "prompt"), [[0.0, 2.0], [1.0, 3.0]]),
            "total_effect": 9.5,
        },
        {"layer": [0, 1], "text": ("prompt", ["a", "b"])},
    )
    result = Result(data, kind="k")
    assert result.to_frame().columns.tolist() == ["layer", "effect", "total_effect"]
    assert set(result.to_frame("value")) == {"layer", "prompt", "text", "value"}
    assert repr(result).count("9.5") == 1


def test_its_text_is_text_in_a_notebook_too(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_text = repr(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # where rich shows what is printed by itself
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("an output of its own"))
    assert repr(result) == plain_text


def test_the_notebook_view_is_escaped() -> None:
    result = Result(xr.DataArray([1.0], {"t": ["<script>"]}, name="v"), kind="k", title="<b>&")
    page = result._repr_html_()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert '"\\u003cscript\\u003e"' in page  # the label, inside the document


def test_a_single_value_shows_itself() -> None:
    assert "0.5" in repr(Result(xr.DataArray(0.5, name="score"), kind="score"))


def test_showing_prints_it(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    result.show()
    assert "Patching" in capsys.readouterr().out


# -- keeping ----------------------------------------------------------------------------------------------


def test_saving_and_loading_gives_the_same_result(result: Result, tmp_path: Path) -> None:
    loaded = Result.load(result.save(tmp_path / "r.pellucid"))
    assert loaded == result
    assert loaded.provenance == result.provenance
    assert loaded.effect.dtype == np.float64
    assert loaded.effect.attrs == {"units": "nats"}
    assert {name: v.dtype for name, v in loaded.data.variables.items()} == {
        name: v.dtype for name, v in result.data.variables.items()
    }


ARRAYS = {
    "bool": np.array([True, False]),
    "half": np.array([0.5, np.nan], np.float16),
    "single": np.array([np.inf, -0.0], np.float32),
    "byte": np.array([-1, 7], np.int8),
    "complex": np.array([1j, 2.0]),
    "time": np.array(["2026-01-01", "NaT"], "datetime64[ns]"),
    "text": np.array(["", "a\x00b\U0001f600\ud83d"]),
    "object text": np.array(["ab", None], object),
    "empty": np.zeros((0, 3)),
    "no text": np.zeros((2, 0), "<U3"),
    "scalar": np.array(3),
    "scalar text": np.array("ab"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_dtype_and_shape_survives(name: str, tmp_path: Path) -> None:
    values = ARRAYS[name]
    result = Result(xr.DataArray(values, dims=[f"d{i}" for i in range(values.ndim)], name="v"), kind="k")
    loaded = Result.load(result.save(tmp_path / "r"))
    assert loaded.values.dtype == result.values.dtype
    assert loaded.values.shape == values.shape
    assert loaded == result


@given(values=arrays(st.sampled_from(["f4", "i8", "u1", "?"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)))
@settings(deadline=None, max_examples=40)
def test_any_array_survives(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "r"
    result = Result(xr.DataArray(values, dims=[f"d{i}" for i in range(values.ndim)]), kind="k")
    assert Result.load(result.save(path)) == result


def test_the_same_result_is_saved_to_the_same_bytes(result: Result, tmp_path: Path) -> None:
    assert result.save(tmp_path / "a").read_bytes() == result.save(tmp_path / "b").read_bytes()


def test_the_file_is_open_to_other_programs(result: Result, tmp_path: Path) -> None:
    with zipfile.ZipFile(result.save(tmp_path / "r")) as archive:
        about = json.loads(archive.read("result.json"))
        entry = about["data"]["data_vars"]["effect"]
        assert (entry["dims"], about["provenance"]["seed"]) == (["layer", "token"], 7)
        with archive.open(entry["data"]) as file:
            np.testing.assert_array_equal(np.load(file, allow_pickle=False), result.values)


def test_arrays_of_objects_and_missing_folders_are_refused(result: Result, tmp_path: Path) -> None:
    objects = Result(xr.DataArray(np.array([{}, []], object), dims="x", name="v"), kind="k")
    with pytest.raises(InputError, match="cannot save 'v': it holds Python objects"):
        objects.save(tmp_path / "r")
    with pytest.raises(InputError, match=r"cannot save a result to .* No such file"):
        result.save(tmp_path / "missing" / "r")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_refused_wherever_the_damage_is(result: Result, tmp_path: Path) -> None:
    whole = result.save(tmp_path / "r").read_bytes()
    path = tmp_path / "damaged"
    for cut in range(0, len(whole), 61):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="is no readable pellucid result"):
            Result.load(path)
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(InputError):
            assert Result.load(path) == result  # the byte did not matter, such as a file date


def test_foreign_files_are_refused_with_one_sentence(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    with pytest.raises(InputError, match="cannot read a result from"):
        Result.load(path)
    path.write_text("layer,effect\n1,2\n")
    with pytest.raises(InputError, match="is no readable pellucid result"):
        Result.load(path)
    for content in ("{}", "[]", '{"format": "pellucid-result", "version": 99}', "nonsense"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("result.json", content)
        with pytest.raises(InputError, match="is no readable pellucid result"):
            Result.load(path)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a pickle was opened",))


def test_a_pickle_inside_is_never_opened(result: Result, tmp_path: Path) -> None:
    import io

    evil = io.BytesIO()
    np.save(evil, np.array([Bomb()], object), allow_pickle=True)
    with zipfile.ZipFile(result.save(tmp_path / "r")) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "evil", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, evil.getvalue() if name.endswith(".npy") else content)
    with pytest.raises(InputError, match="is no readable pellucid result"):
        Result.load(tmp_path / "evil")


def test_importing_results_does_not_import_torch() -> None:
    code = "import sys, pellucid.results; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
