"""What is in the residual stream, read in the model's own words?"""

from pellucid.lenses.attribution import direct_logit_attribution
from pellucid.lenses.logit_lens import logit_lens, unembed

__all__ = ["direct_logit_attribution", "logit_lens", "unembed"]
