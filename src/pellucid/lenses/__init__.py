"""What is in the residual stream, read in the model's own words?"""

from pellucid.lenses.attribution import direct_logit_attribution
from pellucid.lenses.backward_lens import backward_lens
from pellucid.lenses.causal_basis import causal_basis
from pellucid.lenses.decoder_lens import decoder_lens
from pellucid.lenses.future_lens import FutureLens
from pellucid.lenses.head_lens import head_lens
from pellucid.lenses.lens import unembed
from pellucid.lenses.logit_lens import logit_lens, prediction_depth
from pellucid.lenses.patchscope import patchscope
from pellucid.lenses.tuned_lens import TunedLens, lens_quality

__all__ = [
    "FutureLens",
    "TunedLens",
    "backward_lens",
    "causal_basis",
    "decoder_lens",
    "direct_logit_attribution",
    "head_lens",
    "lens_quality",
    "logit_lens",
    "patchscope",
    "prediction_depth",
    "unembed",
]
