"""What is a unit's activation all along a text? Harvested texts, run again for some units.

A harvest keeps where a unit was how active, not what the tokens around gave; the texts are put together again from the
tokens it keeps and run through the model once more, many texts and many units in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.checkpoint import fingerprint
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import stream_of
from pellucid.engine.watching import together, watch
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.neurons.corpus import Text, batches
from pellucid.neurons.harvest import Harvest, Moment


def activations(
    model: Model, harvest: Harvest, units: Sequence[str], prompts: Iterable[int], *, batch: int = 2048
) -> dict[int, Tensor]:
    """[position, unit] float32 of some units at every token of some harvested prompts, by prompt; `batch` is in tokens.

    InputError for another model's harvest, units that were not harvested, and units of your own after loading, where they
    were not given to `Harvest.load`.
    """
    harvest.check(model)
    if fingerprint([u.read for u in harvest.readers.values()]) != harvest.plan.readers:
        raise InputError("this harvest has units of its own: give them to Harvest.load(path, units=[...])")
    found = [harvest.find(unit) for unit in units]
    sites = {name: Site.parse(harvest.readers[name].site) for name, _ in found}
    made: dict[int, Tensor] = {}
    for numbers, inputs in _runs(model, harvest, sorted(set(prompts)), batch):
        real = stream_of(inputs, next(iter(sites.values()))).mask.bool()
        seen: dict[str, Tensor] = {}
        watch(model.anatomy, inputs, together({name: _seer(harvest, name, real, seen) for name in sites}, sites))
        rows = torch.stack([seen[name][:, n] for name, n in found], 1)
        made |= dict(zip(numbers, rows.split(real.sum(1).tolist()), strict=True))
    return made


def _seer(harvest: Harvest, name: str, real: Tensor, seen: dict[str, Tensor]) -> Callable[[Tensor], None]:
    def see(values: Tensor) -> None:
        seen[name] = harvest.readers[name].activations(values[real.to(values.device)])

    return see


def _runs(model: Model, harvest: Harvest, prompts: Sequence[int], batch: int) -> Iterator[tuple[list[int], Inputs]]:
    """Prompts in batches of like length; one by one where the decoder of an encoder-decoder was read."""
    shelf = harvest.shelf
    alone = [prompt for prompt in prompts if shelf.row(prompt) != shelf.row(prompt, "given")]
    for prompt in alone:
        rows = {"input_ids": shelf.row(prompt, "given"), "decoder_input_ids": shelf.row(prompt)}
        yield [prompt], model.inputs({key: torch.tensor([row]) for key, row in rows.items()})
    texts = [Text(prompt, tuple(shelf.row(prompt))) for prompt in prompts if prompt not in alone]
    for group in batches(texts, batch):
        yield [text.number for text in group], model.inputs([list(text.ids) for text in group])


def apart(moments: Iterable[Moment]) -> list[Moment]:
    """Only the first moment of every prompt, so that a page does not show one text many times.

    >>> apart([Moment(3.0, 0, 1), Moment(2.0, 0, 2), Moment(1.0, 4, 0)])
    [Moment(value=3.0, prompt=0, position=1), Moment(value=1.0, prompt=4, position=0)]
    """
    found: dict[int, Moment] = {}
    for moment in moments:
        found.setdefault(moment.prompt, moment)
    return list(found.values())
