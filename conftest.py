"""What every test shares: one thread, no network, and the two trained models, opened once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from typing import TYPE_CHECKING

import pytest

from tests.models import minilm_path, smollm2_path

if TYPE_CHECKING:
    from pellucid import Model


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct: a decoder of 30 layers with grouped queries."""
    import pellucid

    return pellucid.load(smollm2_path())


@pytest.fixture(scope="session")
def minilm() -> Model:
    """all-MiniLM-L6-v2: an encoder of 6 layers."""
    import pellucid

    return pellucid.load(minilm_path())


@pytest.fixture(autouse=True)
def _pages_open_the_packaged_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """README and docs name a model on the hub; here its weights come from the package that carries them."""
    if request.node.path.suffix == ".md":
        model = request.getfixturevalue("smollm2")
        from pellucid.model import load

        monkeypatch.setattr(
            "pellucid.model.load",
            lambda source, **options: model if isinstance(source, str) else load(source, **options),
        )
