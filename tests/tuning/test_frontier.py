"""The trade-off over weights, and whether what a penalty on a reader took away is still to be read."""

from __future__ import annotations

import pytest

from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.tuning.internals import _verdict
from tests.tuning.test_fit import data, opened


def test_the_points_of_a_frontier() -> None:
    found = tu.frontier(
        opened("bert-class"),
        data(),
        tu.Consistency("decoy"),
        weights=[0, 1],
        shifts={"reversed": data(reverse=True)},
        seeds=[0],
        steps=2,
        batch=4,
    )
    assert found.data["point"].values.tolist() == ["plain", "weight 1", "control", "augmented"]
    assert {"accuracy", "low", "high", "shifted", "swap_effect", "cost", "untrained"} <= set(
        found.data.data_vars
    ) and found.title
    with pytest.raises(InputError, match="one objective"):
        tu.frontier(opened("bert-class"), data(), [tu.Consistency("decoy")])  # type: ignore[arg-type]


def test_a_reader_that_is_blinded_is_not_a_property_that_is_gone() -> None:
    """The words are in the embeddings that are not trained, so a new reader finds what the old one lost."""
    import numpy as np

    model, given = opened("bert-class"), data(n=32)
    holds = [text.startswith("he") for text in given.texts]
    reader = tu.direction(model, given, holds, "layers.0.resid_post")
    made = tu.fit(
        model, given, tu.ProbePenalty(reader, weight=5.0), layers=[0], seeds=[0], steps=25, batch=16, learning_rate=3e-3
    )
    after = {a: made.result.data["after"].sel(arm=a).item() for a in ("plain", "objective", "control")}
    assert after["objective"] < min(after["plain"], after["control"]) / 3
    found = tu.evasion(model, made.model, given, holds, reader)
    assert (
        found.data["auc"].sizes == {"when": 2, "layer": 2, "kind": 3}
        and float(found.data["auc"].sel(when="after").max()) > 0.9
    )
    assert found.title.startswith(("Moved or hidden", "Still there"))
    low, high = np.full((2, 3), 0.5), np.full((2, 3), 0.88)
    for after, same, said in (
        (high, 0.65, "Moved or hidden"),
        (low + 0.03, 0.52, "Removed, as far"),
        (high, 0.87, "Still"),
    ):
        assert _verdict(np.array([0.88, same]), np.stack([high, after]), np.stack([low, low]), 80, 320).startswith(said)
    assert _verdict(np.array([0.52, 0.5]), np.stack([low, low]), np.stack([low, low]), 80, 320).startswith("Nothing to")


def test_shuffled_labels_are_at_chance_where_one_direction_has_most_of_the_variance() -> None:
    """A reader of shuffled labels told harmful requests from harmless ones at .82, so that everything would have been called removed."""
    import numpy as np

    model, given = opened("bert-class"), data(n=32)
    holds = [text.startswith("he") for text in given.texts]
    reader = tu.direction(model, given, holds, "layers.0.resid_post")
    found = tu.evasion(model, model, given, holds, reader)
    assert found.title.startswith("Still there")
    assert np.abs(found.data["shuffled"].values - 0.5).max() < 0.3


def test_a_reader_is_asked_for_by_name() -> None:
    model, given = opened("bert-class"), data(n=32)
    with pytest.raises(InputError, match="is no reader"):
        tu.fit(model, given, tu.ProbePenalty("layers.0.resid_post"), seeds=[0])
