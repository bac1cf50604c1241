"""What would an encoder-decoder say if its encoder had stopped after each layer?

The whole decoder reads an intermediate encoder layer, through the encoder's final norm where it has one, and
generates (Langedijk et al. 2023). Nothing is trained, and unlike the logit lens the answer is whole sentences:

    y_l = decode(final_norm(encoder_l(x)))

What an early layer lacks in its format rather than its content also shows as a wrong answer; layer by layer the
distance to the model's own first answer token is given beside it.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Patch
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused
from pellucid.metrics import kl_divergence, sequence_log_probability
from pellucid.model import Model
from pellucid.results import Provenance, Result


def decoder_lens(
    model: Model, prompt: str, *, answer: str | None = None, max_new_tokens: int = 20, progress: bool = True
) -> Result:
    """Let the decoder of an encoder-decoder read every layer of its encoder in the last one's place.

    Gives over `layer` ("embed", then the encoder's blocks) `text`, what is generated greedily; `log_probability` in nats
    of `answer` (by default what the model itself says) under teacher forcing; `kl`, KL(model || layer) of the answer's
    first token. The last row is the model itself. Refused for other kinds of models.

    >>> decoder_lens(model, "translate English to German: The house is old.")  # doctest: +SKIP
    """
    if not any(stack.name == "encoder" for stack in model.anatomy.stacks) or model.anatomy.stacks[-1].name != "decoder":
        raise Refused(f"{model.name} has no encoder and decoder: the decoder lens reads an encoder by its decoder")
    if not isinstance(prompt, str):
        raise InputError("the decoder lens reads one prompt at a time: give a text")
    encoder = next(stack for stack in model.anatomy.stacks if stack.name == "encoder")
    names = ["encoder.embed", *(f"encoder.layers.{block.index}.resid_post" for block in encoder.blocks)]
    with torch.no_grad():
        run = model.run(prompt, keep=names)
    last, read = names[-1], [run.tensor(name) for name in names]
    texts = [model.generate(prompt, edits=[Patch(last, values)], max_new_tokens=max_new_tokens).text for values in read]
    answer = texts[-1] if answer is None else answer
    if not answer.strip():
        raise InputError("the model says nothing here, so its answer has no probability: give answer='...'")
    forced, ids = _forced(model, prompt, answer)
    variants = [Patch(last, values) for values in read]
    log_p = model.sweep(forced, variants, sequence_log_probability([ids]), progress=progress).values[:, 0]
    first = model.run(prompt).logits[:, 0].detach()
    kl = model.sweep(prompt, variants, kl_divergence(first, positions=(0,)), progress=progress).values[:, 0]
    data = xr.Dataset(
        {
            "text": ("layer", np.array(texts, dtype=object)),
            "log_probability": ("layer", log_p.numpy()),
            "kl": ("layer", kl.numpy()),
        },
        coords={
            "layer": np.array(["embed", *(b.index for b in encoder.blocks)], dtype=object),
            "site": ("layer", names),
        },
        attrs={"answer": answer},
    )
    provenance = Provenance(
        "decoder_lens", model.name, digest=model.digest, inputs=[prompt],
        arguments={"answer": answer, "max_new_tokens": max_new_tokens},
    )  # fmt: skip
    return Result(data, kind="decoder lens", title=f"Decoder lens of {model.name}", provenance=provenance)


def _forced(model: Model, prompt: str, answer: str) -> tuple[Inputs, list[int]]:
    """The prompt with the answer's tokens given to the decoder, and those ids."""
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    inputs = model.inputs(prompt)
    start: Tensor = inputs.stream("").ids
    given = torch.cat([start, start.new_tensor([ids])], 1)
    return model.inputs({**inputs.tensors, "decoder_input_ids": given}), ids
