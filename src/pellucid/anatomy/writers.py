"""What does each head, or each neuron, write to the residual stream?

An output projection makes x W + b = sum_u x_u W_u + b of the values x_u of its units (z of a head, the activation of a
neuron). On the way from there to the stream may stand a factor (Granite), a scale per channel, a norm (Gemma 2, OLMo 2).
With a norm's scale held at its value in this run the way is an affine map A, and

    written_u = A(x_u W_u) - A(0)          contribution = sum_u written_u + A(b)

is what reaches the stream, `attn.out` or `mlp.out` in parts: proven at opening. Without a norm A is the same in every
run; with one, `written_u` is what the unit adds beside the others of its run, not what it would add alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pellucid.anatomy.frozen import Map, affine, linearised
from pellucid.anatomy.structure import Attention, Block, Linear, Mlp
from pellucid.anatomy.weights import linear_map
from pellucid.errors import Refused


@dataclass(frozen=True, eq=False)
class Writer:
    """The units of one attention or MLP as they reach the stream; `units` of them, each `width` numbers wide."""

    module: nn.Module
    linear: Linear
    onward: tuple[tuple[str, Map], ...]  # from the projection's output, [..., d_model]
    scale: float  # of what is added, against what is met at the end of these steps
    units: int
    width: int

    @classmethod
    def of(cls, root: nn.Module, block: Block, part: str) -> Writer:
        """The units of "attn", "cross" or "mlp" of a block. Refused, with the reason, where what they make does not
        reach the stream linearly."""
        a: Attention | Mlp | None = block.attentions.get(part) or block.mlps.get(part)
        kind = "heads" if isinstance(a, Attention) else "neurons"
        why = block.refused.get(f"{part}.{kind}.out") or block.refused.get(f"{part}.out")
        if a is None or why is not None or a.linear is None or a.path is None or f"{part}.out" not in block.taps:
            raise Refused(why or f"its {kind} do not write to the residual independently")
        if a.path.onward is None:
            raise Refused(f"what its {kind} make is changed token by token before it reaches the stream")
        units = a.heads if isinstance(a, Attention) else a.linear.width
        width = a.d_value if isinstance(a, Attention) else 1
        module = root.get_submodule(a.linear.module)
        return cls(module, a.linear, a.path.onward, block.taps[f"{part}.out"].layout.scale, units, width)

    def weight(self) -> tuple[Tensor, Tensor]:
        """W [unit, width, d_model] and b [d_model] of the projection alone; more units than `units` where it also reads
        other things beside them."""
        weight, bias = linear_map(self.module, self.linear.shape)
        weight = weight.detach()
        return weight.unflatten(0, (-1, self.width)), weight.new_zeros(
            weight.shape[1]
        ) if bias is None else bias.detach()

    @property
    def held(self) -> bool:
        """Whether a norm stands on the way, whose scale is held at the run's."""
        weight = self.weight()[0]
        x = torch.randn(2, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
        for _, step in self.onward:
            if not affine(step, x):
                return True
            with torch.no_grad():
                x = step(x)
        return False

    def way(self, given: Tensor) -> Map:
        """A, for any x [..., batch, position, d_model], in the run that has `given` [batch, position, unit, width] at the
        projection."""
        if not self.onward:
            return lambda x: x if self.scale == 1.0 else x * self.scale
        weight, bias = (t.to(given.dtype) for t in self.weight())
        names, steps = zip(*self.onward, strict=True)
        run, _ = linearised(steps, names, (given.flatten(2) @ weight.flatten(0, 1) + bias).detach())
        return lambda x: run(x) * self.scale

    def written(self, given: Tensor, which: slice | list[int] = slice(None)) -> Tensor:
        """[unit, batch, position, d_model] what units `which` write; `given` [batch, position, unit, width] (neurons
        without the last) is all that enters the projection."""
        given = given if given.ndim == 4 else given[..., None]
        weight = self.weight()[0].to(given.dtype)
        parts = torch.einsum("bpue,ued->ubpd", given[:, :, which], weight[which])
        return self.reached(given, parts)

    def reached(self, given: Tensor, made: Tensor) -> Tensor:
        """A(made) - A(0): what parts of the projection's output are in the stream, made [..., position, d_model]."""
        way = self.way(given)
        return way(made) - way(made.new_zeros(*given.shape[:2], made.shape[-1])) if self.onward else way(made)

    def total(self, given: Tensor) -> Tensor:
        """[batch, position, d_model] the sum of what the units write (many neurons in three groups) and A(b)."""
        given = given if given.ndim == 4 else given[..., None]
        weight, bias = self.weight()
        given = given.to(weight)
        groups = given.shape[2] if self.width > 1 else 3
        made = [(given[:, :, i::groups].flatten(2) @ weight[i::groups].flatten(0, 1)) for i in range(groups)]
        way, zero = self.way(given), torch.zeros_like(made[0])
        return sum((way(x) - way(zero) for x in made), way(bias.expand(zero.shape)))
