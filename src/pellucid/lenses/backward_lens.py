"""Which words would one step of training teach each layer to say?

The gradient of the loss -log p(target) with respect to an MLP's down projection is a sum over the prompt's tokens,

    dL/dW = sum_i neurons_i^T delta_i          delta_i = dL/d mlp.out_i  [d_model]

so a step of descent makes the layer add -delta_i wherever it meets tokens like i: what it learns can be read as any vector of
the stream is (Katz et al. 2024, "Backward Lens"). Of every layer and token: the words that -delta_i raises and lowers most,
through the model's own head with the scale of its norm held as it is where the answer is read (the paper projects
delta through the norm anew, whose scale depends on it: the words are the same but for the norm's bias); how large delta_i
is; and the token's share of the sum, |neurons_i| |delta_i|. Where a norm or a factor follows the projection, delta is of what
reaches the stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.errors import InputError, PellucidError, at_least
from pellucid.lenses.lens import Held, Layers, answer_texts, last_residual, layer_numbers
from pellucid.metrics import cross_entropy
from pellucid.model import Model
from pellucid.question import Question, extremes
from pellucid.results import Result
from pellucid.technique import settle, technique

ROWS = 64  # vectors read at a time


@technique
def backward_lens(
    model: Model, prompt: Any, target: Any = None, *, top: int = 5, layers: Layers = None, decoder: str | None = None
) -> Result:
    """The gradient of -log p(target) at every MLP's output (of the last stack), in words, on one prompt.

    Gives over `layer` x `position` (`token`): `raised` and `raised_token` [top] of -delta, `lowered` and `lowered_token`
    [top], logits per unit of step; `target_rank`, how many tokens -delta raises more than the target; `size` |delta|; `share`
    of each token in the gradient of the down projection (NaN where its input is not known). InputError for several prompts,
    or an answer that is no single token; Refused without a head that reads the stream.

    >>> backward_lens(model, "The capital of France is", " Rome").sel(layer=20, position=4).raised_token
    <xarray.DataArray 'raised_token' (top: 5)>...
    """
    at_least(1, top=top)
    question = Question.of(model, prompt, target, decoder=decoder)
    if len(question.inputs) != 1:
        raise InputError(f"the backward lens reads one prompt at a time, got {len(question.inputs)}")
    if question.kind not in ("next token", "first token", "masked token") or question.position is None:
        raise InputError(f"the backward lens asks for one token, not for a {question.kind}: name the token")
    answer = question.answers[0].id
    settle(target=answer)
    prefix, numbers = model.anatomy.stacks[-1].prefix, layer_numbers(model, layers)
    outs = [f"{prefix}layers.{n}.mlp.out" for n in numbers]
    neurons = [name.replace(".out", ".neurons") for name in outs]
    known = [name for name in neurons if _known(model, name)]
    loss = cross_entropy(answer, position=question.position)
    run = model.run(question.inputs, keep=[*outs, *known, last_residual(model)], grad_of=loss)
    stream = run.inputs.stream("")
    real = slice(int(stream.starts[0]), int(stream.starts[0]) + int(stream.lengths[0]))
    delta = torch.stack([run.grad(name)[0, real] for name in outs]).float()
    place = stream.find(question.position)
    assert place is not None
    read = Held(model, run.tensor(last_residual(model))[:1, place[0]])
    active = torch.stack([run.tensor(n)[0, real].float().norm(dim=-1) if n in known else delta.new_full(delta.shape[1:2], np.nan) for n in neurons])  # fmt: skip
    sizes = delta.norm(dim=-1)
    weight = active * sizes
    dims = ("layer", "position")
    made: dict[str, Any] = {
        name: ((*dims, "top")[: x.ndim], x.numpy()) for name, x in _words(model, read, -delta, answer, top).items()
    }
    for name in ("raised_token", "lowered_token"):
        made[name] = (made[name][0], answer_texts(model, made[name][1]))
    made |= {"size": (dims, sizes.cpu().numpy()), "share": (dims, (weight / weight.sum(1, keepdim=True)).cpu().numpy())}
    coords = {"layer": numbers, "position": range(delta.shape[1]), "token": ("position", list(stream.labels[0]))}
    title = f"What a step towards {question.answers[0].text!r} would teach each MLP"
    return Result(xr.Dataset(made, coords=coords), kind="backward lens", title=title)


def _known(model: Model, site: str) -> bool:
    try:
        return len(model.sites(site)) == 1
    except PellucidError:  # experts, or neurons that are not proven
        return False


@torch.no_grad()
def _words(model: Model, read: Held, vectors: Tensor, target: int, top: int) -> dict[str, Tensor]:
    """[layer, position, top] words that vectors [layer, position, d] raise and lower, and the target's rank [layer, position]."""
    parts = []
    for some in vectors.flatten(0, 1).split(ROWS):
        said = read(some).cpu()
        parts.append(extremes(said, top) | {"target_rank": (said > said[:, target, None]).sum(-1)})
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, vectors.shape[:2]) for name in parts[0]}
