"""What every test shares: one thread, no network, and the two trained models, opened once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from typing import TYPE_CHECKING

import pytest

from tests.skipped import counted

if TYPE_CHECKING:
    from pellucid import Model


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct: a decoder of 30 layers with grouped queries."""
    from tests import models

    return models.smollm2()


@pytest.fixture(scope="session")
def minilm() -> Model:
    """all-MiniLM-L6-v2: an encoder of 6 layers."""
    from tests import models

    return models.minilm()


@pytest.fixture(autouse=True)
def _examples_stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples find the names that they use and do not make, in a folder that vanishes.

    README and docs name a model on the hub; here its weights come from the package that carries them.
    """
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import pandas as pd

    from tests import examples

    # a table is printed whole, however wide the terminal is
    pd.set_option("display.width", 1000, "display.max_columns", 100, "display.expand_frame_repr", False)
    monkeypatch.chdir(request.getfixturevalue("tmp_path"))
    examples.stage(request.node.dtest, request.node.path)
    if request.node.path.suffix == ".md":
        model = request.getfixturevalue("smollm2")
        from pellucid.model import load

        monkeypatch.setattr(
            "pellucid.model.load",
            lambda source, **options: model if isinstance(source, str) else load(source, **options),
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(counted())
