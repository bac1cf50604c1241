"""What would an encoder-decoder say if its encoder had stopped after each layer?

The whole decoder reads an intermediate encoder layer, through the encoder's final norm where it has one, and
generates (Langedijk et al. 2023). Nothing is trained, and unlike the logit lens the answer is whole sentences:

    y_l = decode(final_norm(encoder_l(x)))

What an early layer lacks in its format rather than its content also shows as a wrong answer; layer by layer the
distance to the model's own first answer token is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Edit, Patch
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused
from pellucid.lenses.lens import layer_coords
from pellucid.metrics import kl_divergence, sequence_log_probability
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import settle, technique


@technique
def decoder_lens(
    model: Model, prompt: str, *, target: str | None = None, max_new_tokens: int = 20, edits: Sequence[Edit] = ()
) -> Result:
    """Let the decoder of an encoder-decoder read every layer of its encoder in the last one's place.

    Gives over `layer` ("embed", then the encoder's blocks) `text`, what is generated greedily; `log_probability` in nats
    of `target` (by default what the model itself says) under teacher forcing; `kl`, KL(model || layer) of the answer's
    first token. The last row is the model itself, under the `edits`. Refused for other kinds of models.

    >>> decoder_lens(translator, "translate English to German: The house is old.")
    Decoder lens of T5ForConditionalGeneration
    decoder lens: text, log_probability, kl over layer 3...
    """
    if not any(stack.name == "encoder" for stack in model.anatomy.stacks) or model.anatomy.stacks[-1].name != "decoder":
        raise Refused(f"{model.name} has no encoder and decoder: the decoder lens reads an encoder by its decoder")
    if not isinstance(prompt, str):
        raise InputError("the decoder lens reads one prompt at a time: give a text")
    encoder = next(stack for stack in model.anatomy.stacks if stack.name == "encoder")
    names = ["encoder.embed", *(f"encoder.layers.{block.index}.resid_post" for block in encoder.blocks)]
    with torch.no_grad():
        run = model.run(prompt, keep=names, edits=edits)
    last, read = names[-1], [run.tensor(name) for name in names]
    variants = [[*edits, Patch(last, values)] for values in read]
    texts = [model.generate(prompt, edits=v, max_new_tokens=max_new_tokens).text for v in progress(variants, "layers")]
    target = texts[-1] if target is None else target
    settle(target=target)
    if not target.strip():
        raise InputError("the model says nothing here, so its answer has no probability: give target='...'")
    given, ids = _given(model, prompt, target)
    log_p = model.sweep(given, variants, sequence_log_probability([ids])).values[:, 0]
    kl = model.sweep(prompt, variants, kl_divergence(run.logits[:, 0].detach(), positions=(0,))).values[:, 0]
    data = xr.Dataset(
        {
            "text": ("layer", np.array(texts, dtype=object)),
            "log_probability": ("layer", log_p.numpy()),
            "kl": ("layer", kl.numpy()),
        },
        coords=layer_coords(names),
        attrs={"target": target},
    )
    return Result(data, kind="decoder lens", title=f"Decoder lens of {model.name}")


def _given(model: Model, prompt: str, target: str) -> tuple[Inputs, list[int]]:
    """The prompt with the answer's tokens given to the decoder, and those ids."""
    ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    inputs = model.inputs(prompt)
    start: Tensor = inputs.stream("").ids
    given = torch.cat([start, start.new_tensor([ids])], 1)
    return model.inputs({**inputs.tensors, "decoder_input_ids": given}), ids
