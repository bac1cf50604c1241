"""A module that stands in for `vllm`: a Llama of its own on packed tokens, in steps, as vLLM's engine runs one.

What is like there: a decoder layer that returns (hidden, residual), whose sum is the stream, norms that add both, prompts split
over steps by a budget of tokens, requests that change places, inference mode, buffers that are written to again after a hook saw
them. No attention kernel: every row's keys and values are kept and attended to.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import LlamaForCausalLM


class Norm(nn.Module):
    """Of h, or of h + residual, both of which it overwrites as fused kernels do."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.eps = like.weight, like.variance_epsilon

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Any:
        x = h if residual is None else h + residual
        made = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        if residual is None:
            return made
        residual.copy_(x)
        h.copy_(made)
        return h, residual


class Attention(nn.Module):
    def __init__(self, like: Any, model: Model) -> None:
        super().__init__()
        self.like, self.d = like, like.head_dim
        self.rotary, self.packed = model.rotary, model.packed
        self.cache: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            linear(hidden_states, getattr(self.like, f"{n}_proj").weight).unflatten(-1, (-1, self.d)) for n in "qkv"
        )
        cos, sin = (x[0][:, None] for x in self.rotary(hidden_states, positions[None]))

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        q, k, out, start = turned(q), turned(k), [], 0
        for name, n in self.packed:
            part = slice(start, start := start + n)
            before = self.cache.get(name)
            keys, values = (
                (k[part], v[part])
                if before is None
                else (torch.cat([b, x[part]]) for b, x in zip(before, (k, v), strict=True))
            )
            self.cache[name] = keys, values
            mask = positions[part][:, None] >= torch.arange(len(keys))
            repeat = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q[part], keys.repeat_interleave(repeat, 1)) * self.d**-0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(repeat, 1)).flatten(1))
        return linear(torch.cat(out), self.like.o_proj.weight)


class MLP(nn.Module):
    def __init__(self, like: Any) -> None:
        super().__init__()
        self.like = like

    def forward(self, x: Tensor) -> Tensor:
        up, gate, down = (getattr(self.like, f"{n}_proj").weight for n in ("up", "gate", "down"))
        return linear(silu(linear(x, gate)) * linear(x, up), down)


class Layer(nn.Module):
    def __init__(self, like: Any, model: Model) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(like.self_attn, model), MLP(like.mlp)
        self.first, self.second = Norm(like.input_layernorm), Norm(like.post_attention_layernorm)

    def forward(self, positions: Tensor, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            h, residual = self.first(h), h.clone()
        else:
            h, residual = self.first(h, residual)
        h, residual = self.second(self.self_attn(positions=positions, hidden_states=h), residual)
        return self.mlp(h), residual


class Model(nn.Module):
    def __init__(self, like: Any) -> None:
        super().__init__()
        self.packed: list[tuple[str, int]] = []
        self.rotary, self.embed, self.head = like.model.rotary_emb, like.model.embed_tokens, like.lm_head
        self.layers, self.norm = nn.ModuleList(Layer(each, self) for each in like.model.layers), Norm(like.model.norm)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        h, residual = self.embed(input_ids), None
        for layer in self.layers:
            h, residual = layer(positions, h, residual)
        return self.norm(h, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.head.weight)


class Runner:
    def __init__(self, model: Model) -> None:
        self.model, self.input_batch = model, SimpleNamespace()
        self.query_start_loc = SimpleNamespace(np=np.zeros(64, dtype=np.int32))

    def get_model(self) -> Model:
        return self.model

    def step(self, work: list[tuple[Any, int]]) -> Tensor:
        """Requests, and how many tokens of each are computed; gives the last state of each."""
        counts = [n for _, n in work]
        ends = np.cumsum([0, *counts])
        self.query_start_loc.np[: len(ends)] = ends
        done = [r.done for r, _ in work]
        self.input_batch = SimpleNamespace(
            num_reqs=len(work), req_ids=[r.name for r, _ in work], num_computed_tokens_cpu=np.array(done)
        )
        self.model.packed[:] = [(r.name, n) for r, n in work]
        ids = torch.tensor([i for r, n in work for i in r.ids[r.done : r.done + n]])
        positions = torch.cat([torch.arange(d, d + n) for d, n in zip(done, counts, strict=True)])
        hidden = self.model(input_ids=ids, positions=positions)
        for r, n in work:
            r.done += n
        return hidden[torch.tensor(ends[1:] - 1)]


class Engine:
    """Chunks of at most `budget` tokens a step; those who wait last come first, so that rows change places."""

    def __init__(self, runner: Runner, budget: int) -> None:
        self.runner, self.budget, self.live, self.count = runner, budget, [], 0
        self.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.aborted: list[str] = []

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> str:
        if len(prompt["prompt_token_ids"]) > 100:
            raise ValueError("the prompt is longer than the maximum model length")
        self.count += 1
        ids = list(prompt["prompt_token_ids"])
        self.live.append(
            SimpleNamespace(name=f"{name}-{self.count}", row=name, ids=ids, done=0, n=len(ids), params=params, said=[])
        )
        return self.live[-1].name

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        self.live = [r for r in self.live if r.row not in names]

    @torch.inference_mode()
    def step(self) -> list[Any]:
        left, work, ended = self.budget, [], []
        for r in reversed(self.live):
            if n := min(left, len(r.ids) - r.done):
                work.append((r, n))
                left -= n
        self.live = self.live[1:] + self.live[:1]
        for (r, _), state in zip(work, self.runner.step(work), strict=True):
            if r.done < len(r.ids):
                continue
            said = self.runner.model.compute_logits(state).log_softmax(-1)
            token = int(said.argmax()) if r.params.temperature == 0 else int(torch.multinomial(said.exp(), 1))
            r.ids.append(token)
            r.said.append({token: SimpleNamespace(logprob=float(said[token]))})
            stopped = token in r.params.stop_token_ids
            if stopped or len(r.said) == r.params.max_tokens:
                out = SimpleNamespace(
                    token_ids=r.ids[r.n :], logprobs=r.said, finish_reason="stop" if stopped else "length"
                )
                ended.append(SimpleNamespace(request_id=r.row, finished=True, outputs=[out]))
                self.live.remove(r)
        return ended


class LLM:
    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self, model: str, model_impl: str, max_num_batched_tokens: int = 7, wrong: Any = None, **options: Any
    ) -> None:
        self.opened.append({"model": model, "model_impl": model_impl, **options})
        torch.manual_seed(0)  # as vLLM does
        if model_impl == "transformers":
            raise NotImplementedError("no such back end here")
        made = Model(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
        if wrong is not None:
            wrong(made)
        self.llm_engine = Engine(Runner(made), max_num_batched_tokens)


def sampling(max_tokens: int, temperature: float, detokenize: bool, stop_token_ids: Any = (), **more: Any) -> Any:
    return SimpleNamespace(max_tokens=max_tokens, temperature=temperature, stop_token_ids=stop_token_ids, more=more)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """`import vllm` gives this, until the patch is undone."""
    made: Any = ModuleType("vllm")
    made.__spec__, made.__version__, made.LLM, made.SamplingParams = (
        ModuleSpec("vllm", None),
        "0 (stand-in)",
        LLM,
        sampling,
    )
    patch.setitem(sys.modules, "vllm", made)
