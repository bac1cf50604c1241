"""What do the examples in docstrings stand on?

An example is two lines that a reader understands, so what it needs and does not make stands here under the name it uses: `model`,
`texts`, `bank` ... A name of a room (`pellucid.neurons`: `found`) stands in the class of that room, all others in `Anywhere`.
Each is built when an example first asks for it, once a session; models are tiny and random, so examples show what is stable:
titles, dimensions, shapes.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import doctest
import importlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pellucid as pl
from pellucid.probing import Treebank
from tests.models import smollm2, smollm2_path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pellucid"


def once(build: Callable[[], Any]) -> Any:
    """A thing of a room: built when first asked for, the same for every example."""
    return staticmethod(cache(build))


def llama(layers: int = 24, seed: int = 0, **options: Any) -> Any:
    """A deep and narrow random Llama under SmolLM2's tokenizer: prompts are read as real ones, and every pass is cheap."""
    words = Anywhere.tokenizer()
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(words), num_hidden_layers=layers, tie_word_embeddings=True, **shape, **options)
    return pl.load(LlamaForCausalLM(config).eval(), tokenizer=words)


class Anywhere:
    """What means the same in every room."""

    pl = staticmethod(lambda: pl)
    Path = staticmethod(lambda: Path)

    @once
    def tokenizer() -> Any:
        if smollm2.cache_info().currsize:
            return smollm2().tokenizer
        path = smollm2_path()
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    @once
    def model() -> Any:
        return llama()

    @once
    def classifier() -> Any:
        words = Anywhere.tokenizer()
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=64, pad_token_id=words.pad_token_id)  # fmt: skip
        return pl.load(BertForSequenceClassification(config).eval(), tokenizer=words)

    @once
    def prompt() -> str:
        return "The capital of France is"

    @once
    def texts() -> list[str]:
        return said(16)

    @once
    def labels() -> list[int]:
        return [1, 0] * 8

    @once
    def test_texts() -> list[str]:
        return ["I liked the good story.", "I left the dull scene.", "A clever film.", "A bad, lifeless film."]

    @once
    def test_labels() -> list[int]:
        return [1, 0, 1, 0]

    @once
    def prompts() -> Any:
        return pl.tasks.capitals(Anywhere.tokenizer(), 4)

    @once
    def bank() -> Any:
        return Treebank.parse(conllu())


def said(n: int) -> list[str]:
    """Short texts, praise and blame in turn."""
    things, ways = (
        ("film", "story", "song", "play"),
        ("in every scene", "from the start", "to the end", "at once", "again"),
    )
    words = (("good", "liked"), ("bad", "left"), ("clever", "praised"), ("dull", "hated"))
    return [
        f"The {things[i // 4 % 4]} was {words[i % 4][0]} and I {words[i % 4][1]} it {ways[i % 5]}." for i in range(n)
    ]


def conllu(sentences: int = 12) -> str:
    """A treebank of sentences such as "the old dog sees a cat .", each word with its tag, its head and its relation."""
    nouns, verbs, kinds = ("dog", "cat", "bird", "girl"), ("sees", "likes", "finds"), ("old", "small", "happy")
    made = []
    for i in range(sentences):
        one, other = nouns[i % 4], nouns[(i // 3 + 1) % 4]
        rows = [("the", "DET", 2, "det"), (one, "NOUN", 3, "nsubj"), (verbs[i % 3], "VERB", 0, "root"),
                ("a", "DET", 6, "det"), (kinds[i // 2 % 3], "ADJ", 6, "amod"), (other, "NOUN", 3, "obj"),
                (".", "PUNCT", 3, "punct")]  # fmt: skip
        made += [
            f"{n}\t{word}\t{word}\t{tag}\t{tag}\t_\t{head}\t{relation}\t_\t_"
            for n, (word, tag, head, relation) in enumerate(rows, 1)
        ]
        made.append("")
    return "\n".join(made)


class Attribution(Anywhere):
    @once
    def reviews() -> list[str]:
        return said(8)


class Causal(Anywhere):
    @once
    def model() -> Any:
        return llama(layers=10)

    @once
    def professions() -> Any:
        return pl.tasks.gendered_professions(Anywhere.tokenizer(), 8)

    @once
    def task() -> Any:
        """Is it the same word, and is that what was asked for? Two words and a sign, one token each."""
        from pellucid.causal.abstraction import CausalModel, Task

        words = [" dog", " cat", " bird"]
        program = CausalModel(
            {"a": words, "b": words, "sign": [" yes", " no"]},
            {"same": (("a", "b"), lambda a, b: a == b), "out": (("same", "sign"), lambda s, c: s == (c == " yes"))},
        )
        answers = [Anywhere.tokenizer().encode(word)[0] for word in (" no", " yes")]
        return Task(program, lambda s: f"Is{s['a']} the{s['b']}?{s['sign']}", lambda out: answers[out])

    @once
    def tuned() -> Any:
        return llama(layers=10, seed=1)


class Circuits(Anywhere):
    @once
    def model() -> Any:
        return llama(layers=2)

    @once
    def prompts() -> Any:
        return pl.tasks.indirect_objects(Anywhere.tokenizer(), 4)

    @once
    def held_out() -> Any:
        return pl.tasks.indirect_objects(Anywhere.tokenizer(), 4, seed=1)

    @once
    def scores() -> Any:
        return pl.circuits.edge_attribution(Circuits.model(), Circuits.prompts(), how="resample")


class Lenses(Anywhere):
    @once
    def texts() -> list[str]:
        return said(64)

    @once
    def translator() -> Any:
        """An encoder-decoder."""
        words = Anywhere.tokenizer()
        torch.manual_seed(0)
        config = T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                          decoder_start_token_id=0, pad_token_id=0, eos_token_id=words.eos_token_id)  # fmt: skip
        return pl.load(T5ForConditionalGeneration(config).eval(), tokenizer=words)


class Neurons(Anywhere):
    @once
    def texts() -> list[str]:
        return said(64)

    @once
    def held_out() -> list[str]:
        return said(96)[64:]

    @once
    def found() -> Any:
        return pl.neurons.harvest(Anywhere.model(), said(32), "layers.3.mlp.neurons")

    @once
    def units() -> list[str]:
        return [f"layers.3.mlp.neurons.{i}" for i in (5, 17, 20)]

    @once
    def contexts() -> Any:
        return pl.neurons.read_contexts(Anywhere.model(), Neurons.found(), Neurons.units())

    @once
    def dictionary() -> Any:
        from pellucid.neurons.dictionaries import SparseAutoencoder, TopKLoss

        rows = Anywhere.model().run(said(16), keep=["layers.3.resid_post"]).tensor("layers.3.resid_post")
        sae = SparseAutoencoder("layers.3.resid_post", features=64, objective=TopKLoss(4), steps=20, batch=64)
        return sae.fit(rows.flatten(0, 1)).dictionary_

    @once
    def tags() -> list[str]:
        return ["noun", "verb", "noun", "name"] * 64

    @once
    def activations() -> Any:
        return torch.rand(256, 3, generator=torch.Generator().manual_seed(0)).numpy()

    @once
    def where() -> list[int]:
        """The text that each token belongs to."""
        return [i // 8 for i in range(256)]


class Probing(Anywhere):
    @once
    def model() -> Any:
        return llama(layers=2)

    @once
    def features() -> Any:
        return pl.probing.read(Probing.model(), Anywhere.bank().tags())

    @once
    def texts() -> list[str]:
        made = {"{} is in {}.": (("Rome", "Lima"), ("Italy", "Peru")), "{} says {}.": (("A dog", "A cat"), ("woof", "meow")),
                "One can {} {}.": (("eat", "drive"), ("bread", "cars"))}  # fmt: skip
        return [text.format(a, b) for text, (one, other) in made.items() for a in one for b in other]

    @once
    def truth() -> list[bool]:
        return [True, False, False, True] * 3

    @once
    def topics() -> list[str]:
        return ["places"] * 4 + ["sounds"] * 4 + ["uses"] * 4


class Store(Anywhere):
    @once
    def store() -> Any:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return pl.store.store_activations(Anywhere.model(), Anywhere.texts(), ["layers.3.resid_post"], folder)


class Views(Anywhere):
    @once
    def model() -> Any:
        return llama(layers=2)

    @once
    def prompts() -> Any:
        return Circuits.prompts()

    @once
    def shares() -> Any:
        return pl.attribution.gradient_x_input(Views.model(), Anywhere.prompt(), " Paris")

    @once
    def drops() -> Any:
        return pl.attribution.occlusion(Views.model(), Anywhere.prompt(), " Paris")

    attributions = shares

    @once
    def logits() -> Any:
        return pl.lenses.logit_lens(Views.model(), Anywhere.prompt())

    @once
    def tuned() -> Any:
        lens = pl.lenses.TunedLens(tokens=600).fit(Views.model(), said(64))
        return pl.lenses.logit_lens(Views.model(), Anywhere.prompt(), through=lens)

    @once
    def found() -> Any:
        return Circuits.scores().circuit(fraction=0.02)


class Surgery(Anywhere):
    @once
    def model() -> Any:
        return llama(layers=8)

    @once
    def texts() -> list[str]:
        return said(32)

    @once
    def tuned() -> Any:
        return llama(layers=8, seed=1)

    @once
    def one() -> Any:
        return pl.surgery.take(Surgery.model(), Surgery.tuned(), slice(2, 6))

    @once
    def other() -> Any:
        return pl.surgery.take(Surgery.model(), llama(layers=8, seed=2), slice(2, 6))

    @once
    def gate() -> Any:
        variants = {"a": Surgery.one(), "b": Surgery.other()}
        return pl.surgery.Gate().fit(Surgery.model(), variants, Surgery.texts(), layers=slice(2, 6))

    @once
    def C() -> Any:
        return pl.surgery.KeyCovariance(layers=1).fit(Surgery.model(), Surgery.texts())

    @once
    def edited() -> Any:
        fact = pl.surgery.Fact("The capital of {} is", "France", " Rome", " Paris")
        return pl.surgery.edit(Surgery.model(), fact, covariance=Surgery.C(), layers=1)

    base = sender = model
    receiver = tuned


class Safety(Anywhere):
    @once
    def happy() -> list[str]:
        return [f"{who} is glad of the {what}." for who in ("He", "She", "Anna") for what in ("news", "rain", "song")]

    @once
    def sad() -> list[str]:
        return [text.replace("glad of", "sad at") for text in Safety.happy()]

    @once
    def contrast() -> Any:
        return pl.safety.Contrast("mean", sites="layers.8:20.resid_post").fit(
            Anywhere.model(), Safety.happy(), Safety.sad()
        )

    @once
    def statements() -> Any:
        true, false = [], []
        for one, other in (("Rome", "Italy"), ("Lima", "Peru"), ("Oslo", "Norway"), ("Cairo", "Egypt")):
            true += [f"{one} is in {other}.", f"{other} is where {one} is."]
            false += [f"{one} is in Japan.", f"Japan is where {one} is."]
        return pl.safety.Statements.paired(true, false, ["in", "where"] * 4)

    @once
    def reader() -> Any:
        return pl.safety.ConceptReader("mean", sites="layers.8:12.resid_post").fit(
            Anywhere.model(), Safety.statements()
        )

    harm = reader

    @once
    def questions() -> list[tuple[str, str, str]]:
        pairs = [("France", " Paris"), ("Italy", " Rome"), ("Peru", " Lima"), ("Egypt", " Cairo"),
                 ("Japan", " Tokyo"), ("Spain", " Madrid"), ("Cuba", " Havana"), ("Iran", " Tehran")]  # fmt: skip
        return [(f"The capital of {a} is", b, c) for (a, b), (_, c) in zip(pairs, pairs[1:] + pairs[:1], strict=True)]

    @once
    def prompts() -> list[str]:
        return said(16)

    requests = prompts

    @once
    def answers() -> list[str]:
        return [" good", " bad"] * 8

    @once
    def harmful() -> list[bool]:
        return [True, False] * 8

    @once
    def topics() -> list[str]:
        return [topic for topic in ("film", "story", "song", "play") for _ in range(4)]

    @once
    def benign() -> list[str]:
        return [f"{text} {who}" for text in said(10) for who in ("Do you?", "And you?")]

    @once
    def cheap() -> Any:
        return pl.safety.calibrate(Anywhere.model(), Safety.monitor(), Safety.benign(), alarms=0.1, max_new_tokens=2)

    @once
    def monitor() -> Any:
        return pl.safety.fit_monitor(
            Anywhere.model(), said(16), [1, 0] * 8, site="layers.4.resid_post", max_new_tokens=2
        )

    @once
    def dear() -> Any:
        made = pl.safety.fit_monitor(
            Anywhere.model(), said(16), [1, 0] * 8, site="layers.20.resid_post", max_new_tokens=2
        )
        return pl.safety.calibrate(Anywhere.model(), made, Safety.benign(), alarms=0.1, max_new_tokens=2)

    @once
    def dictionary() -> Any:
        return Neurons.dictionary()

    @once
    def claimed() -> list[str]:
        return [f"I think it is {wrong.strip()}. {stem}" for stem, _, wrong in Safety.questions()]

    @once
    def plain() -> list[str]:
        return [stem for stem, _, _ in Safety.questions()]

    @once
    def true() -> list[str]:
        return [right for _, right, _ in Safety.questions()]

    @once
    def false() -> list[str]:
        return [wrong for _, _, wrong in Safety.questions()]

    @once
    def relations() -> list[str]:
        return ["one"] * 4 + ["other"] * 4

    @once
    def sentiment() -> Any:
        return lambda texts: [text.count("a") for text in texts]

    @once
    def train() -> list[str]:
        return said(8)

    @once
    def test() -> list[str]:
        return said(16)[8:]

    @once
    def measure() -> Any:
        def measured(model: Any, texts: list[str]) -> dict[str, list[float]]:
            last = [model.run(text).logits[0, -1] for text in texts]
            return {"facts": [float(row.max()) for row in last], "others": [float(row.std()) for row in last]}

        return measured

    @once
    def edit_facts() -> Any:
        return lambda model, *_: model.changed(pl.changed.Copied(("model.norm.weight",)))


class Tuning(Anywhere):
    model = Anywhere.classifier

    @once
    def TrainingArguments() -> Any:
        from transformers import TrainingArguments

        return TrainingArguments

    @once
    def encoder() -> Any:
        """A model without a head."""
        return pl.load(Anywhere.classifier().module.bert, tokenizer=Anywhere.tokenizer())

    @once
    def data() -> Any:
        """Reviews behind a word that gives the answer away."""
        return Tuning.drawn(("stone", "river"))

    @once
    def other() -> Any:
        return Tuning.drawn(("river", "stone"))

    @staticmethod
    def drawn(words: tuple[str, str]) -> Any:
        texts = [f"a {words[i % 2]}, {text}" for i, text in enumerate(said(16))]
        spans = {"decoy": [[word] for word in words] * 8, "rationale": [[text.split()[4]] for text in texts]}
        return pl.tuning.Rationales(texts, [1, 0] * 8, spans, properties={"praise": [True, False] * 8})

    @once
    def tuned() -> Any:
        return pl.tuning.fit(Tuning.model(), Tuning.data(), [pl.tuning.Consistency("decoy")], seeds=[0], steps=2)

    @once
    def guided() -> Any:
        """Tuned to answer by way of a concept."""
        return pl.tuning.fit(Tuning.model(), Tuning.data(), pl.tuning.Bottleneck(), control=False, seeds=[0], steps=2)

    @once
    def selecting() -> Any:
        return pl.tuning.fit(Tuning.model(), Tuning.data(), pl.tuning.Select(warm=0), control=False, seeds=[0], steps=2)

    @once
    def writer() -> Any:
        return llama(layers=2)

    @once
    def listener() -> Any:
        return llama(layers=2, seed=1)

    @once
    def explained() -> Any:
        asked = [f"In which country is {place}?" for place in ("Rome", "Lima")]
        return pl.tuning.Explained(
            asked, [" Italy", " Peru"], [" It is in Italy.", " It is in Peru."], choices=[" Italy", " Peru"]
        )

    @once
    def holds() -> list[bool]:
        return [True, False] * 8

    @once
    def reader() -> Any:
        return pl.tuning.direction(Tuning.model(), Tuning.data(), Tuning.holds(), "layers.1.resid_post")


def ordinary(first: int, last: int) -> str:
    """Lines of ordinary text: those of the licence."""
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() if line.strip()]
    return "\n".join(" ".join(lines[i : i + 5]) for i in range(first, last, 5))


FILES: dict[str, Callable[[Path], Any]] = {
    "dev.conllu": lambda path: path.write_text(conllu(), encoding="utf-8"),
    "texts.txt": lambda path: path.write_text(ordinary(0, 60), encoding="utf-8"),
    "held_out.txt": lambda path: path.write_text(ordinary(130, 136), encoding="utf-8"),
    "concepts.safetensors": lambda path: Tuning.guided().objectives["objective"][0].save(path),
}

ROOMS: dict[str, type[Anywhere]] = {
    "attribution": Attribution,
    "causal": Causal,
    "circuits": Circuits,
    "lenses": Lenses,
    "neurons": Neurons,
    "probing": Probing,
    "safety": Safety,
    "store": Store,
    "surgery": Surgery,
    "tuning": Tuning,
    "views": Views,
}


def room(path: Path) -> tuple[Any, ...]:
    """Where the examples of a file find what they need: the things of its room, then what the room itself offers."""
    if not path.is_relative_to(SOURCE):
        return (Anywhere,)
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return ROOMS.get(name, Anywhere), importlib.import_module(f"pellucid.{name}")


def needed(examples: list[doctest.Example], known: set[str]) -> list[str]:
    """Names that the examples use before they make them."""
    made, missing = known | set(dir(builtins)), []
    for example in examples:
        nodes = list(ast.walk(ast.parse(example.source)))
        inner = {node.arg for node in nodes if isinstance(node, ast.arg)}  # of lambdas and comprehensions
        inner |= {name.id for node in nodes if isinstance(node, ast.comprehension) for name in _names(node.target)}
        names = [node for node in nodes if isinstance(node, ast.Name) and node.id not in inner]
        if not example.options.get(doctest.SKIP):
            missing += [n.id for n in names if isinstance(n.ctx, ast.Load) and n.id not in made]
        made |= {name.id for name in names}
    return list(dict.fromkeys(missing))


def _names(node: ast.AST) -> list[ast.Name]:
    return [part for part in ast.walk(node) if isinstance(part, ast.Name)]


def stage(test: doctest.DocTest, path: Path) -> None:
    """Give a test what its examples need."""
    things, *public = room(path)
    for name, write in FILES.items():
        if any(name in example.source for example in test.examples if not example.options.get(doctest.SKIP)):
            write(Path(name))
    for name in needed(test.examples, set(test.globs)):
        if hasattr(things, name):
            test.globs[name] = getattr(things, name)()
        elif public and hasattr(*public, name):
            test.globs[name] = getattr(*public, name)
