"""Weights that know which token decides guide the token classifier; uniform ones guide it less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attention import attention_diagnostic
from pellucid.attention.diagnostic import GUIDES, TokenClassifier
from pellucid.errors import InputError
from tests.attention.opening import classifier

RNG = np.random.default_rng(0)
FILLERS = ["the", "of", "is", "in", "and", "to", "a", "city", "store"]


def texts(n):
    """Which of two names stands in the text decides; the other name's opposite stands in it too, as noise."""
    made, labels, oracle = [], [], []
    for _ in range(n):
        words = RNG.choice(FILLERS, 9).tolist()
        label, at, noise = int(RNG.integers(2)), *RNG.choice(9, 2, replace=False).tolist()
        words[at] = ("Mary", "John")[label]
        words[noise] = ("Mary", "John")[int(RNG.integers(2))]
        made.append(" ".join(words))
        labels.append(label)
        oracle.append(np.eye(9)[at])
    return made, labels, oracle


def test_an_oracle_guides_the_stranger_and_uniform_weights_do_not():
    train, y, first = texts(60)
    test, z, second = texts(40)
    found = attention_diagnostic(classifier(), train, y, test, z, guides={"oracle": first + second}, epochs=30, seeds=2)
    assert found.guide.values.tolist() == [*GUIDES, "oracle"]
    by = {name: float(found.accuracy.sel(guide=name)) for name in found.guide.values}
    assert by["oracle"] == 1.0
    assert by["uniform"] < 0.9
    assert float(found.lead.sel(guide="uniform")) == 0
    assert (found.low <= found.accuracy).all()
    assert float(found.majority) == max(np.mean(z), 1 - np.mean(z))


def test_the_classifier_learns_weights_of_its_own():
    torch.manual_seed(0)
    x, y = torch.randn(200, 6, 8) * 0.1, torch.arange(200) % 2
    x[:, 3, 0] += 5.0  # says which token counts
    x[torch.arange(200), 3, 1] = 3.0 * (2 * y - 1)
    other = torch.arange(200) % 6
    x[torch.arange(200), other, 1] += 6.0 * torch.randint(2, (200,)) * (other != 3)
    mask = torch.ones(200, 6)
    own = TokenClassifier(epochs=40).fit(x[:150], y[:150], None, mask[:150])
    assert own.score(x[150:], y[150:], None, mask[150:]) > 0.95
    assert own.predict(x[150:], None, mask[150:]).shape == (50,)


def test_padding_gets_no_weight():
    x = torch.randn(4, 5, 3)
    mask = torch.tensor([[1.0, 1, 1, 0, 0]] * 4)
    fitted = TokenClassifier(epochs=2).fit(x, torch.tensor([0, 1, 0, 1]), None, mask)
    changed = x.clone()
    changed[:, 3:] = 100.0
    torch.testing.assert_close(fitted.logits(x, None, mask), fitted.logits(changed, None, mask))


def test_numbers_that_do_not_match_are_errors():
    with pytest.raises(InputError, match="one label for each"):
        attention_diagnostic(classifier(), ["a"], [0, 1], ["the"], [0])
    with pytest.raises(InputError, match="one weight per token"):
        attention_diagnostic(classifier(), ["the city"], [0], ["the"], [0], guides={"mine": [[1.0], [1.0]]})
    with pytest.raises(InputError, match="unknown measure"):
        attention_diagnostic(classifier(), ["the"], [0], ["the"], [0], measure="gaze")
