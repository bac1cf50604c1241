"""How much of an input token could have reached a position, if every attention were a pipe of limited width?

Attention flow (Abnar and Zuidema 2020): the tokens of every layer are the nodes of a network, the mixing matrices M_l
of rollout (see there) the capacities of its edges, and

    flow[query, key] = the maximum flow from token `key` of the input to token `query` of the last layer,

every pair a problem of its own. Unlike rollout it does not multiply, so it does not fade with depth. The flow equals
the smallest cut, and where that is the same for all tokens the flow says nothing about them. Two such cuts are common
in encoders, and warned about: what token j gives to layer 1 (every flow is min(1, sum over queries of M_1[., j]),
whatever the query; random encoders of five layers are already so), and the pipes
just below the query (all flows alike).

The problems are solved by Dinic's algorithm in scipy, whose capacities are whole numbers: they are counted in units of
2^-30. Rounding moves a cut by at most half a unit per edge, so flows are wrong by at most `error_bound` = edges / 2^31.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.attention.patterns import labelled, single
from pellucid.attention.rollout import Residual, Step, mixed
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, listed
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

UNIT = 2.0**-30
ALIKE = 0.1  # flows that differ by less hardly tell tokens apart
Node = tuple[str, int]  # a stack and how many of its attentions came before


@technique
def flow(
    model: Model,
    prompt: Any,
    *,
    queries: Sequence[int] | int | None = None,
    residual: Residual = 0.5,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
) -> Result:
    """Maximum flow from every input token to positions of the last layer.

    `queries` are positions (negatives from the end); all of them by default. Gives `flow` [query, key], in an
    encoder-decoder also `source` [query, source_key], from 0 to 1, and `error_bound`; `residual` is that of `rollout`.
    Raises as `patterns` does; InputError for a query the prompt does not have.

    >>> flow(model, "The capital of France is", queries=-1).flow
    <xarray.DataArray 'flow' (query: 1, key: 5)>...
    """
    inputs = single(model, prompt, decoder)
    found, steps = mixed(model, inputs, residual, edits)
    main = found.main
    n = len(next(s for s in steps if s.kind == main).stays)
    wanted = (
        list(range(n))
        if queries is None
        else [queries]
        if isinstance(queries, int)
        else listed("queries", queries, "positions")
    )
    for query in wanted:
        if not isinstance(query, int | np.integer) or not -n <= query < n:
            raise InputError(f"there is no query {query!r}: the last stack has {n} tokens")
    wanted = [query % n for query in wanted]
    network = Network([s for s in steps if s.kind.stack == main.stack or found.paired])
    variables: dict[str, Any] = {"flow": (main.tokens, network.flows(main.stack, wanted, main.stack))}
    if found.paired:
        variables["source"] = (("query", "source_key"), network.flows(main.stack, wanted, "encoder"))
    elif why := network.empty(main.stack, wanted, variables["flow"][1]):
        warnings.warn(f"attention flow is degenerate here: {why}", stacklevel=2)
    data = labelled(xr.Dataset({**variables, "error_bound": network.error_bound}), found, wanted)
    return Result(data, kind="attention flow", title=f"Attention flow, residual share {residual}")


class Network:
    """The tokens of every state as nodes, mixing weights as edges from the later state to the earlier one.

    A flow is the same along reversed edges, so it is sent from the query down to the key.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.first: dict[Node, int] = {}
        self.sizes: dict[str, int] = {}
        self.depth: dict[str, int] = {}
        self.steps = steps
        from_, to, capacity = [], [], []
        size = 0

        def node(stack: str, depth: int, width: int) -> int:
            nonlocal size
            if (stack, depth) not in self.first:
                self.first[stack, depth], size = size, size + width
                self.sizes[stack] = width
            return self.first[stack, depth]

        for step in steps:
            stack, width = step.kind.stack, len(step.stays)
            depth = self.depth.get(stack, 0)
            below, above = node(stack, depth, width), node(stack, depth + 1, width)
            self.depth[stack] = depth + 1
            if step.kind.area == "attn":
                parts = [(below, step.mixing)]
            else:
                top = node("encoder", self.depth["encoder"], step.pattern.shape[1])
                parts = [(below, torch.diag(step.stays)), (top, step.moves)]
            for start, weights in parts:
                q, k = weights.nonzero(as_tuple=True)
                from_.append(above + q.numpy())
                to.append(start + k.numpy())
                capacity.append(weights[q, k].numpy())
        self.from_, self.to, self.capacity = map(np.concatenate, (from_, to, capacity))
        self.size = size

    @property
    def error_bound(self) -> float:
        return len(self.capacity) * UNIT / 2

    def graph(self) -> Any:
        from scipy.sparse import csr_array

        whole = np.rint(self.capacity / UNIT).astype(np.int32)
        return csr_array((whole, (self.from_, self.to)), shape=(self.size, self.size))

    def flows(self, stack: str, queries: Sequence[int], source: str) -> np.ndarray:
        """[query, key] the flow between the last state of one stack and the input of another."""
        from scipy.sparse.csgraph import maximum_flow

        top, bottom = self.first[stack, self.depth[stack]], self.first[source, 0]
        graph, made = self.graph(), np.zeros((len(queries), self.sizes[source]))
        for row, query in enumerate(queries):
            for key in range(self.sizes[source]):
                made[row, key] = maximum_flow(graph, top + query, bottom + key, method="dinic").flow_value * UNIT
        return made

    def empty(self, stack: str, queries: Sequence[int], flows: np.ndarray) -> str:
        """Why the flows [query, key] say nothing about tokens; "" if they may."""
        steps = [s for s in self.steps if s.kind.stack == stack]
        first = steps[0].mixing.sum(0).clamp(max=1).numpy()
        if len(steps) > 1 and np.allclose(flows, first[None], atol=1e-3 + self.error_bound):
            return "every flow is what the token gives to layer 1, whatever the query"
        rows = (np.delete(row, query) for query, row in zip(queries, flows, strict=True))
        others = [row[row > 0] for row in rows if (row > 0).sum() > 1]  # what is masked has no flow
        if len(steps) > 1 and others and max(float(np.ptp(row)) for row in others) < ALIKE:
            return f"the flows from all tokens but the query itself are alike within {ALIKE}"
        return ""
