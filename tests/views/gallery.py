"""One document of every kind, with numbers that look real and tokens that try to break out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import xarray as xr

from pellucid.views import schema as s
from pellucid.views.hosts import output, save_html
from pellucid.views.schema import Code, Document, Fact, Numbers, Origin

TOKENS = ("The", " Eiffel", " Tower", " is", " located", " in", " the", " city", " of")
NASTY = ("<script>", "alert(1)", "</script>", "<img src=x", " onerror=alert(2)>", "&amp;", "\n", "\u202e", "é🙂")
CODE = Code(python="import pellucid as pl\n\nmodel = pl.load('gpt2')", shell="pellucid report gpt2 'The Eiffel Tower'")
ORIGIN = Origin(line="logit_lens · gpt2 · weights 0123456789ab · pellucid 0.1.0", facts=(Fact(name="seed", value="0"),))


def document(title: str, data: s.View, **more: str) -> Document:
    return Document(title=title, data=data, code=CODE, provenance=ORIGIN, **more)


def tokens(texts: tuple[str, ...] = TOKENS, seed: int = 0) -> s.Tokens:
    draw = np.random.default_rng(seed)
    one, two = draw.normal(size=len(texts)), draw.normal(size=len(texts))
    tracks = (
        s.Track(name="integrated gradients", values=Numbers.of(one)),
        s.Track(name="occlusion", values=Numbers.of(one + two / 2)),
    )
    return s.Tokens(tokens=texts, positions=tuple(range(len(texts))), tracks=tracks, unit="share of the logit difference",
                    comparison=(Fact(name="integrated gradients and occlusion", value="0.81"),))  # fmt: skip


def attention(texts: tuple[str, ...] = TOKENS, layers: int = 6, heads: int = 8) -> s.Attention:
    draw, n = np.random.default_rng(1), len(texts)
    logits = draw.normal(size=(layers, heads, n, n)) * draw.uniform(0.5, 4, size=(layers, heads, 1, 1))
    logits[1, 3] += 9 * np.eye(n, k=-1)
    logits[..., 0] += 1.5
    logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
    pattern = np.exp(logits - logits.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    names = {(1, 3): "previous token", (2, 1): "induction", (4, 5): "induction"}
    listed = tuple(
        s.Head(component=f"layers.{a}.attn.heads.{h}", layer=a, head=h, role=names.get((a, h), ""))
        for a in range(layers) for h in range(heads)
    )  # fmt: skip
    flow = s.Flow(name="rollout", values=Numbers.of(pattern.mean((0, 1))))
    stack = s.Looking(queries=texts, keys=texts, heads=listed, pattern=Numbers.of(pattern.reshape(-1, n, n), "uint8"), flows=(flow,), first=heads + 3)  # fmt: skip
    return s.Attention(stacks=(stack,))


def lens(texts: tuple[str, ...] = TOKENS, layers: int = 12) -> s.Lens:
    draw, n = np.random.default_rng(2), len(texts)
    words = (" Paris", " Rome", " France", " the", " a", ",", "-", " London", *texts)
    sure = np.linspace(0.05, 0.85, layers)[:, None] * draw.uniform(0.5, 1, size=(1, n))
    top = draw.integers(1, len(words), size=(layers, n, 3))
    top[layers // 2 :, -1, 0] = 0
    p = np.stack([sure, (1 - sure) / 3, (1 - sure) / 6], -1)
    rank = np.maximum(0, np.round(np.exp((1 - sure) * 8) - 6))
    followed = tuple(
        s.Followed(word=w, rank=Numbers.of(rank + i), log_probability=Numbers.of(np.log(sure / (1 + 4 * i))))
        for i, w in enumerate((" Paris", " Rome"))
    )
    reading = s.Reading(
        followed=followed,
        name="logit",
        top=Numbers.of(top),
        probability=Numbers.of(p),
        rank=Numbers.of(rank),
        kl=Numbers.of(5 * (1 - sure)),
        entropy=Numbers.of(4 * (1 - sure)),
    )
    tuned = s.Reading(
        name="tuned", top=Numbers.of(top), probability=Numbers.of(np.sqrt(p)), kl=Numbers.of(2 * (1 - sure))
    )
    return s.Lens(tokens=texts, positions=tuple(range(n)), layers=tuple(map(str, range(layers))), components=tuple(f"layers.{i}.resid_post" for i in range(layers)),
                  words=words, readings=(reading, tuned), prediction=(*texts[1:], " Paris"))  # fmt: skip


def contributions(layers: int = 12) -> s.Contributions:
    draw = np.random.default_rng(3)
    names, sites, parts, layer = ["embedding"], ["embed"], ["embedding"], [-1]
    for a in range(layers):
        for h in range(4):
            names.append(f"head {a}.{h}")
            sites.append(f"layers.{a}.attn.heads.{h}")
            parts.append("attention")
            layer.append(a)
        names.append(f"MLP {a}")
        sites.append(f"layers.{a}.mlp.out")
        parts.append("MLP")
        layer.append(a)
    values = draw.normal(size=len(names)) * np.exp(np.array(layer) / 6) / 8
    return s.Contributions(names=tuple(names), components=tuple(sites), parts=tuple(parts), layer=Numbers.of(layer), values=Numbers.of(values),
                           total=float(values.sum()), unit="logit difference Paris − Rome")  # fmt: skip


def patching(texts: tuple[str, ...] = TOKENS, layers: int = 12) -> s.Grid:
    draw, n = np.random.default_rng(4), len(texts)
    effect = draw.normal(size=(layers, n)) * 0.03
    effect[: layers // 2, 1] += 0.9
    effect[layers // 2 :, -1] += 0.95
    other = tuple(" Colos" if i == 1 else t for i, t in enumerate(texts))
    planes = tuple(
        s.Plane(name=name, values=Numbers.of(effect * k), low=Numbers.of(effect * k - 0.05), high=Numbers.of(effect * k + 0.05), component=f"layers.{{row}}.{site}")
        for name, site, k in (("residual", "resid_pre", 1.0), ("attention", "attn.out", 0.4), ("MLP", "mlp.out", -0.3))
    )  # fmt: skip
    return s.Grid(rows=s.Axis(name="layer", labels=tuple(map(str, range(layers)))), columns=s.Axis(name="token", labels=texts, positions=tuple(range(n)), marked=(1,)),
                  planes=planes, unit="answer brought back", full=1.0, prompts=(texts, other), facts=(Fact(name="clean", value="7.31"),))  # fmt: skip


def heads(layers: int = 6, count: int = 8) -> s.Grid:
    effect = np.random.default_rng(5).normal(size=(layers, count)) ** 3 / 4
    plane = s.Plane(name="effect", values=Numbers.of(effect), component="layers.{row}.attn.heads.{column}")
    return s.Grid(rows=s.Axis(name="layer", labels=tuple(map(str, range(layers)))), columns=s.Axis(name="head", labels=tuple(map(str, range(count)))),
                  planes=(plane,), unit="change of the logit difference")  # fmt: skip


def circuit(layers: int = 6, count: int = 4) -> s.Circuit:
    draw = np.random.default_rng(6)
    nodes = [s.Node(component="embed", label="embed", type="embed", layer=-1)]
    for a in range(layers):
        nodes += [
            s.Node(component=f"layers.{a}.attn.heads.{h}", label=f"{a}.{h}", type="head", layer=a, unit=h)
            for h in range(count)
        ]
        nodes.append(s.Node(component=f"layers.{a}.mlp", label=f"MLP {a}", type="mlp", layer=a))
    nodes.append(s.Node(component="logits", label="logits", type="logits", layer=layers))
    edges = []
    for j, to in enumerate(nodes):
        for i, source in enumerate(nodes):
            before = source.layer < to.layer or (
                source.layer == to.layer and source.type == "head" and to.type == "mlp"
            )
            if before and draw.random() < 0.14:
                edges.append(
                    (i, j, draw.choice(list("qkv")) if to.type == "head" else "", draw.normal() * (0.3 + draw.random()))
                )
    sources, targets, ports, scores = zip(*edges, strict=True)
    return s.Circuit(nodes=tuple(nodes), sources=Numbers.of(sources), targets=Numbers.of(targets), ports=tuple(map(str, ports)), scores=Numbers.of(scores),
                     about=f"{len(edges)} of 400 edges; the rest switched off by resample.")  # fmt: skip


def curves() -> s.Curves:
    x = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    y = 1 - np.exp(-x * 60)
    lines = (
        s.Line(name="by size", x=Numbers.of(x), y=Numbers.of(y), low=Numbers.of(y - 0.08), high=Numbers.of(y + 0.05)),
        s.Line(name="random", x=Numbers.of(x), y=Numbers.of(x), dashed=True),
    )
    return s.Curves(
        x=s.Ruler(name="share of edges", log=True),
        y=s.Ruler(name="faithfulness"),
        lines=lines,
        levels=(s.Level(name="the whole model", y=1.0),),
    )


def neuron(texts: tuple[str, ...] = TOKENS) -> s.Neuron:
    draw = np.random.default_rng(7)
    contexts = tuple(
        s.Context(
            tokens=texts,
            values=Numbers.of(np.maximum(0, draw.normal(size=len(texts)) + 2 * (np.arange(len(texts)) == 2))),
            note=f"text {i}",
        )
        for i in range(4)
    )
    edges = np.linspace(-0.5, 4, 19)
    return s.Neuron(component="layers.3.mlp.neurons.1234", contexts=contexts, edges=Numbers.of(edges), counts=Numbers.of((9000 * np.exp(-np.arange(18) / 1.6)).astype(int)),
                    raises=tuple(s.Effect(word=w, value=v) for w, v in ((" tower", 1.9), (" monument", 1.2), (" bridge", 0.7))),
                    lowers=tuple(s.Effect(word=w, value=v) for w, v in ((" river", -0.8), (" sea", -0.5))), facts=(Fact(name="active at", value="3.1% of tokens"),))  # fmt: skip


def traces(texts: tuple[str, ...] = TOKENS) -> s.Traces:
    draw = np.random.default_rng(8)
    values = draw.normal(size=(6, len(texts))) + np.linspace(-1, 2, len(texts))
    rate = np.linspace(0, 1, 30)
    rocs = tuple(
        s.Roc(
            false_positive=Numbers.of(rate),
            true_positive=Numbers.of(rate ** (1 / (1 + a))),
            area=1 - 1 / (2 + a),
            low=0.95 - 1 / (2 + a),
            high=1.02 - 1 / (2 + a),
            control=0.5,
        )
        for a in range(6)
    )
    return s.Traces(tokens=texts, positions=tuple(range(len(texts))), rows=s.Axis(name="layer", labels=tuple(map(str, range(6))), components=tuple(f"layers.{i}.resid_post" for i in range(6))),
                    values=Numbers.of(values), unit="log odds of being true", thresholds=Numbers.of(np.ones(6)), rocs=rocs)  # fmt: skip


def anatomy() -> s.Anatomy:
    sites = ("attn.out", "attn.pattern", "attn.q", "mlp.neurons", "mlp.out", "resid_mid", "resid_post", "resid_pre")
    blocks = (
        s.Block(
            layers=tuple(range(6)),
            form="pre-norm",
            sites=sites,
            heads=8,
            kv_heads=2,
            neurons=2048,
            refused=(Fact(name="experts", value="it has none"),),
        ),
    )
    proofs = (s.Proof(name="logits", claim="with everything kept, the logits are the native ones", holds=True, error=0.0), s.Proof(name="attention", claim="pattern times v is z", holds=True, error=3.2e-7),
              s.Proof(name="neurons", claim="neurons times the down projection make the contribution", holds=False, error=0.4, detail="layer 3"), s.Proof(name="experts", claim="the experts add up", holds=None))  # fmt: skip
    return s.Anatomy(
        model="LlamaForCausalLM",
        stacks=(s.Stack(name="", width=512, blocks=blocks),),
        proofs=proofs,
        refused=(Fact(name="experts", value="no layer has any"),),
    )


def table() -> s.Table:
    draw = np.random.default_rng(9)
    columns = (s.Column(name="head", texts=tuple(f"{a}.{h}" for a in range(6) for h in range(8))), s.Column(name="effect", numbers=Numbers.of(draw.normal(size=48))),
               s.Column(name="p", numbers=Numbers.of(draw.uniform(size=48)), bar=1.0), s.Column(name="answer", texts=tuple(NASTY[i] for i in draw.integers(0, 9, 48)), tokens=True))  # fmt: skip
    return s.Table(
        columns=columns, rows=48, components=tuple(f"layers.{a}.attn.heads.{h}" for a in range(6) for h in range(8))
    )


def gallery(texts: tuple[str, ...] = TOKENS) -> list[Document]:
    return [
        document("Which words does the answer rest on?", tokens(texts), lead="Blue supports the answer, orange speaks against it.", care="what counts as absence is a choice."),
        document("When does the answer appear?", lens(texts)),
        document("Where does each head look?", attention(texts)),
        document("Where does the fact travel?", patching(texts)),
        document("Which heads does the answer need?", heads()),
        document("Which parts write the answer?", contributions()),
        document("Who sends what to whom?", circuit()),
        document("How small can the circuit be?", curves()),
        document("A neuron", neuron(texts)),
        document("Is this true?", traces(texts)),
        document("What the model is made of", anatomy()),
        document("Every head", table()),
    ]  # fmt: skip


def nasty() -> list[Document]:
    """Everything a prompt, a token, a title or a model's name could try."""
    found = gallery(NASTY)
    bad = "</script><script>alert(3)</script>"
    return [Document(title=bad + d.title, data=d.data, lead=bad, care=bad, code=Code(python=bad, shell=bad), provenance=Origin(line=bad, facts=(Fact(name=bad, value=bad),))) for d in found]  # fmt: skip


def notebook() -> str:
    """Two outputs as a notebook shows them: markup set by script, then its scripts evaluated anew."""
    from pellucid.views.markup import Html, tag

    cells = [
        tag("template", Html(output(document(title, data))))
        for title, data in (("First", heads()), ("Second", attention()))
    ]
    show = """for (const t of document.querySelectorAll("template")) {
      const cell = document.createElement("div"); cell.className = "cell"; document.body.append(cell); cell.innerHTML = t.innerHTML;
      for (const old of cell.querySelectorAll("script")) { const s = document.createElement("script"); for (const a of old.attributes) s.setAttribute(a.name, a.value); s.textContent = old.textContent; old.replaceWith(s); }
    }"""
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>notebook</title><body data-jp-theme-light=false style='background:#111'>{''.join(cells)}<script>{show}</script>"


def saved_notebook() -> str:
    """A notebook as nbconvert writes it to a page: outputs as they are, read by the browser's own parser."""
    outputs = [
        output(document(title, data))
        for title, data in (("First", heads()), ("Second", attention()), ("Third", lens()))
    ]
    cells = "".join(
        f'<div class="jp-RenderedHTMLCommon jp-RenderedHTML jp-OutputArea-output">{o}</div>' for o in outputs
    )
    return f"<!doctype html><html lang=en><head><meta charset=utf-8><title>saved</title></head><body class=jp-Notebook data-jp-theme-light=true><main>{cells}</main></body></html>"


def spoken() -> s.Attention:
    """An encoder-decoder's three attentions."""
    stack = attention().stacks[0]
    source, said = stack.queries, (" Das", " ist", " es")
    draw = np.random.default_rng(11)
    cross = draw.dirichlet(np.ones(len(source)), size=(4, len(said)))
    own = draw.dirichlet(np.ones(len(said)), size=(4, len(said)))

    def named(area: str, n: int) -> tuple[s.Head, ...]:
        return tuple(s.Head(component=f"{area}.heads.{i}", layer=0, head=i) for i in range(n))

    return s.Attention(stacks=(
        s.Looking(name="decoder to encoder", queries=said, keys=source, heads=named("decoder.layers.0.cross", 4), pattern=Numbers.of(cross, "uint8")),
        s.Looking(name="encoder", queries=source, keys=source, heads=tuple(s.Head(component=f"encoder.{h.component}", layer=h.layer, head=h.head) for h in stack.heads), pattern=stack.pattern),
        s.Looking(name="decoder", queries=said, keys=said, heads=named("decoder.layers.0.attn", 4), pattern=Numbers.of(own, "uint8")),
    ))  # fmt: skip


def long_attention(texts: tuple[str, ...], layers: int = 30, heads: int = 9) -> s.Attention:
    """All heads of a model on a long prompt, as `looking` keeps them; most rest on the first token, some look back."""
    from pellucid.results import Result
    from pellucid.views.looking import attention as kept

    n, draw = len(texts), np.random.default_rng(12)
    values = np.zeros((layers, heads, n, n), np.float32)
    values[..., 0] = 0.6
    for a in range(layers):
        for h in range(heads):
            back = 1 + int(draw.integers(40))
            values[a, h, np.arange(back, n), np.arange(n - back)] += 0.3
    values[..., np.arange(n), np.arange(n)] += 0.1
    data = xr.DataArray(
        values,
        {"layer": range(layers), "head": range(heads), "query": range(n), "key": range(n)},
        ("layer", "head", "query", "key"),
        "pattern",
    )
    return kept(Result(data.assign_coords(query_token=("query", list(texts)), key_token=("key", list(texts))), kind="attention patterns"))  # fmt: skip


def report() -> str:
    """The report of a tiny model on a prompt that tries to break out."""
    import pellucid as pl
    from pellucid.views.report import build
    from tests.zoo import build as tiny
    from tests.zoo import tokenizer

    module = tiny("llama")
    model = pl.load(module, tokenizer=tokenizer(module))
    return build(
        model,
        "The <script>alert(5)</script> of France is",
        counterfactual="The <script>alert(5)</script> of Italy is",
    ).html


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_html(folder / "gallery.html", *gallery(), title="Every kind of view")
    save_html(folder / "nasty.html", *nasty(), title="</title><script>alert(4)</script>")
    long = tuple(f" w{i}" for i in range(512))
    save_html(folder / "long.html", document("Tokens", tokens(long)), document("Lens", lens(long, 30)), document("Attention", long_attention(long)), document("Patching", patching(long, 30)), document("Traces", traces(long)), title="512 tokens")  # fmt: skip
    save_html(folder / "spoken.html", document("Attention of a translator", spoken()))
    (folder / "notebook.html").write_text(notebook(), encoding="utf-8")
    (folder / "saved.html").write_text(saved_notebook(), encoding="utf-8")
    (folder / "report.html").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
