"""Which features does a dictionary see at a site, and what do they write?

    f = activation(x W_enc + b_enc),      y^ = f W_dec + b_dec

A sparse autoencoder reads and writes the same site, y = x; a transcoder (Dunefsky et al. 2024) reads one site and writes
another. The rows of W_dec have length 1, so a feature's activation is the length of what it writes, in the units of the
site. Scaling and centring of the training data are folded into the weights.

Some tokens (the first one of many models) carry a residual a hundred times as long as all others. A dictionary has a
`limit`: rows longer than it are no business of its features, which are 0 there, and edits leave them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.engine.edits import Edit
from pellucid.engine.run import Run
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, SiteError
from pellucid.model import Model
from pellucid.neurons.dictionaries import formats, saelens
from pellucid.neurons.dictionaries.editing import (
    Change,
    ChangeFeatures,
    PatchFeatures,
    Positions,
    Splice,
    placed,
    values_of,
)
from pellucid.neurons.dictionaries.functions import Activation
from pellucid.results import Result
from pellucid.technique import technique


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary: encoder [d_in, features], decoder [features, d_out], and their biases.

    `site` is read and `writes` written to; `digest` tells the weights of the model it was trained on.

    >>> from pellucid.neurons.dictionaries import ReLU
    >>> d = Dictionary(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), ReLU(), "layers.0.resid_post")
    >>> d.encode(torch.tensor([3.0, -4.0]))
    tensor([3., 0.])
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    activation: Activation
    site: str
    writes: str = ""
    limit: float = float("inf")
    model: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.encoder.ndim != 2 or self.decoder.ndim != 2:
            raise InputError("expected an encoder [d_in, features] and a decoder [features, d_out]")
        d_in, n = self.encoder.shape
        expected = ((n,), (n, self.decoder.shape[-1]), (self.decoder.shape[-1],))
        found = tuple(tuple(t.shape) for t in (self.encoder_bias, self.decoder, self.decoder_bias))
        if found != expected:
            raise InputError(
                f"an encoder [{d_in}, {n}] needs a bias, a decoder and its bias of {expected}: these are {found}"
            )
        if len(Site.parse(self.site).dims) != 3 or len(Site.parse(self.writes or self.site).dims) != 3:
            raise SiteError(f"a dictionary reads vectors at every position: {self.site!r} does not hold such")
        object.__setattr__(self, "writes", self.writes or self.site)

    def __len__(self) -> int:
        return len(self.decoder)

    def __repr__(self) -> str:
        kind = "sparse autoencoder" if self.writes == self.site else f"transcoder to {self.writes}"
        return f"<Dictionary of {len(self)} features at {self.site} ({kind}, {type(self.activation).__name__})>"

    # ---- what it computes

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., features] of what is met at the site, [..., d_in]; 0 on rows beyond the limit."""
        if x.shape[-1] != len(self.encoder):
            raise InputError(f"this dictionary reads {len(self.encoder)} numbers at {self.site!r}, not {x.shape[-1]}")
        x = x.to(self.encoder)
        return self.activation(x @ self.encoder + self.encoder_bias) * self.within(x)[..., None]

    def __call__(self, x: Tensor) -> Tensor:
        """`encode`: a dictionary is a reader for `pellucid.neurons.Units`, so its features are harvested as neurons are."""
        return self.encode(x)

    def decode(self, f: Tensor) -> Tensor:
        """What the features write, [..., d_out], of activations [..., features]."""
        if f.shape[-1] != len(self):
            raise InputError(f"this dictionary has {len(self)} features, not {f.shape[-1]}")
        return f.to(self.decoder) @ self.decoder + self.decoder_bias

    def within(self, x: Tensor) -> Tensor:
        """[...] whether each row is one the dictionary is for."""
        return x.float().norm(dim=-1) <= self.limit

    @technique
    def features(self, model: Model, prompt: Any) -> Result:
        """Activations of prompts over `batch`, `position` and `feature`: those features that are on somewhere.

        `prompt` is anything `model.run` takes, or a run that kept the site. Padding is NaN; the tokens are in `token`.
        """
        self.check(model)
        run = prompt if isinstance(prompt, Run) else run_until(model.anatomy, model.inputs(prompt), [self.site])
        stream = run.stream(Site.parse(self.site))
        f = self.encode(run.tensor(self.site).detach()).cpu()
        real = stream.mask.bool().cpu()
        on = (f * real[..., None]).flatten(0, 1).amax(0).nonzero()[:, 0]
        values = torch.where(real[..., None], f[..., on], torch.nan)
        width = values.shape[1]
        tokens = [[""] * int(start) + list(row) + [""] * (width - len(row) - int(start)) for row, start in zip(stream.labels, stream.starts, strict=True)]  # fmt: skip
        data = xr.DataArray(
            values.numpy(), dims=("batch", "position", "feature"), name="activation",
            coords={"position": range(width), "feature": on.numpy(), "token": (("batch", "position"), tokens)},
        )  # fmt: skip
        return Result(data, kind="features", title=f"Features at {self.site}")

    def check(self, model: Model) -> None:
        """InputError if it belongs to other weights; SiteError or Refused if the model lacks its sites."""
        check_weights(model, self.digest, "this dictionary")
        for site in (self.site, self.writes):
            model.sites(site)

    # ---- features as sites

    def direction(self, feature: int) -> Tensor:
        """What one feature writes at activation 1, [d_out]."""
        return self.decoder[self._known(feature)[0]]

    def edits(
        self,
        feature: int | Sequence[int],
        change: Change = "ablate",
        value: float | Sequence[float] | Tensor = 0.0,
        *,
        positions: Positions = None,
    ) -> list[Edit]:
        """Edits that change features and nothing else: what the dictionary does not explain stays.

        "ablate" sets them to 0, "scale" multiplies them by `value`, "set" puts `value`, "steer" adds `value` whether they
        are on or not. `value` is one number, or one per feature. For model.run, generate and sweep.
        """
        chosen = self._known(feature)
        numbers = values_of(change, value, chosen)
        return placed(ChangeFeatures, self, positions, features=tuple(chosen), change=change, value=numbers)

    def patch(self, feature: int | Sequence[int], source: Any, *, positions: Positions = None) -> list[Edit]:
        """Edits that give features the activations they have in another run or prompt, at the same positions."""
        if self.writes != self.site:
            raise InputError(
                "features of a transcoder are read at another site than they write to: set them to a value instead of "
                "patching them"
            )
        return placed(PatchFeatures, self, positions, features=tuple(self._known(feature)), source=source)

    def splice(self, *, constant: Tensor | None = None, positions: Positions = None) -> list[Edit]:
        """Edits that put the reconstruction in place of the site: what the dictionary does not explain is lost.

        With `constant` [d_out], that instead, on the same rows: the control.
        """
        return placed(Splice, self, positions, constant=constant)

    def _known(self, feature: int | Sequence[int]) -> list[int]:
        chosen = list(feature) if isinstance(feature, Iterable) else [feature]
        wrong = [i for i in chosen if not isinstance(i, SupportsIndex) or not 0 <= int(i) < len(self)]
        if wrong or not chosen:
            raise InputError(f"feature {wrong or chosen} is not in this dictionary: expected 0 to {len(self) - 1}")
        return [int(i) for i in chosen]

    # ---- files

    def save(self, path: str | Path) -> Path:
        """A folder with cfg.json and sae_weights.safetensors, as SAELens reads them."""
        return saelens.write(vars(self), Path(path))

    @classmethod
    @technique
    def load(
        cls, path: str | Path, *, site: str = "", writes: str = "", folder: str = "", revision: str | None = None
    ) -> Dictionary:
        """A folder that `save`, SAELens, sparsify or dictionary_learning wrote, or one of Gemma Scope (see `formats`).

        `path` may be a repository on the hub and `folder` one of its folders, at a `revision`. `site` and `writes` where the
        folder does not say them, or in names not known here. InputError or Refused says what is missing or not understood.
        """
        return cls(**formats.read(path, site, writes, folder, revision))
