"""The same word for the same thing: every public signature, every result's program, every saved thing.

docs/house.md has the table of words. A name may be used for one thing only; what a word is forbidden for is said beside it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import pellucid as pl
from pellucid.model import Model

FOLDERS = (
    "attribution",
    "attribution.evaluation",
    "attention",
    "causal",
    "circuits",
    "lenses",
    "neurons",
    "neurons.dictionaries",
    "probing",
    "safety",
    "surgery",
    "tuning",
)
FORBIDDEN = {  # a word found in public signatures before, and the word that stands for it now
    "forced": "decoder",
    "answer": "target",
    "wrong": "against",
    "ablation": "how",
    "at": "site, sites or positions",
    "position": "positions",
    "senders": "over",
    "lr": "learning_rate",
    "rate": "learning_rate",
    "samples": "draws",
    "shuffles": "draws",
    "permutations": "draws",
    "bootstraps": "draws",
    "copies": "draws or seeds",
    "starts": "restarts",
    "progress": "pl.quiet()",
    "batch_size": "batch",
    "n_layers": "layers",
    "layer_indices": "layers",
    "verbose": "pl.quiet()",
    "random_state": "seed",
}
FIRST = ("model", "self", "cls")


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and every public method of a public class, by its address."""
    for folder in FOLDERS:
        try:
            package = importlib.import_module(f"pellucid.{folder}")
        except ModuleNotFoundError:
            continue
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isfunction(thing):
                yield f"pl.{folder}.{name}", thing
            elif inspect.isclass(thing) and thing.__module__.startswith("pellucid"):
                for word, method in vars(thing).items():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method) and (not word.startswith("_") or word == "__init__"):
                        yield f"pl.{folder}.{name}.{word}", method
    for word, method in vars(Model).items():
        if inspect.isfunction(method) and not word.startswith("_"):
            yield f"pl.Model.{word}", method


PUBLIC = dict(public())


@pytest.mark.parametrize("address", PUBLIC)
def test_a_signature_uses_the_words_of_the_house(address: str) -> None:
    parameters = inspect.signature(PUBLIC[address]).parameters
    wrong = {name: FORBIDDEN[name] for name in parameters if name in FORBIDDEN}
    assert not wrong, f"{address} says {wrong}"


@pytest.mark.parametrize("address", PUBLIC)
def test_the_model_comes_first(address: str) -> None:
    names = list(inspect.signature(PUBLIC[address]).parameters)
    if "model" in names and not address.endswith("__init__"):
        assert names[0] == "model" or (names[0] in FIRST and names[1] == "model"), names


@pytest.mark.parametrize(
    "address", [a for a in PUBLIC if "Result" in str(inspect.signature(PUBLIC[a]).return_annotation)]
)
def test_what_gives_a_result_records_its_call(address: str) -> None:
    assert hasattr(PUBLIC[address], "__wrapped__"), f"{address} returns a result without @technique"


def fitted() -> list[type]:
    """Every public class with a `fit`."""
    packages = [importlib.import_module(f"pellucid.{folder}") for folder in FOLDERS]
    things = [getattr(package, name) for package in packages for name in package.__all__]
    return list({t.__name__: t for t in things if inspect.isclass(t) and callable(getattr(t, "fit", None))}.values())


@pytest.mark.parametrize("kind", fitted(), ids=lambda c: c.__name__)
def test_what_is_fitted_keeps_what_it_learnt_apart_from_its_settings(kind: type) -> None:
    assert dataclasses.is_dataclass(kind), f"{kind.__name__} is no dataclass, so its settings cannot be printed"
    for each in dataclasses.fields(kind):
        assert each.init != each.name.endswith("_"), f"{kind.__name__}.{each.name}"


def test_every_public_name_can_be_imported_without_the_rest() -> None:
    assert set(pl.__all__) <= set(dir(pl))
