"""What one knows from another library, beside how it is said here: docs/coming_from.md, with the numbers that both sides gave.

    python scripts/coming_from.py --write --python transformer_lens=/path/to/python --python captum=...

Both sides of a pair are programs that leave a tensor in `value`; they run on the same weights (GPT-2's shape in small, seeded) in
processes of their own, theirs in an environment where their library is installed. Without an interpreter for it a library keeps the
numbers of the last time, which stand in docs/coming_from.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "coming_from.md", ROOT / "docs" / "coming_from.json"

MODULE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
config = GPT2Config(n_layer=4, n_head=4, n_embd=64, vocab_size=100, n_positions=64, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
module = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for p in module.parameters():
        p.mul_(6.0) if p.ndim == 2 else p  # so that heads and layers differ in what they do
ids = torch.tensor([[5, 17, 42, 8, 77, 3]])
other = torch.tensor([[5, 17, 61, 8, 77, 3]])
"""
TOKENIZER = """
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0"))
import tempfile
from transformers import AutoTokenizer
folder = tempfile.mkdtemp()
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="0", eos_token="0").save_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
OURS = MODULE + "import pellucid as pl\nmodel = pl.load(module)\n"

# library -> how it opens the model, and pairs of (what, theirs, ours); "" where a side needs no number
LIBRARIES: dict[str, tuple[str, str, list[tuple[str, str, str]]]] = {
    "transformer_lens": (
        "transformer-lens",
        """
        from transformer_lens.model_bridge import TransformerBridge
        bridge = TransformerBridge.boot_transformers("local", hf_model=module, tokenizer=tokenizer)
        """,
        [
            (
                "a residual by its name",
                """
                _, cache = bridge.run_with_cache(ids)
                value = cache["blocks.2.hook_resid_post"]
                """,
                """
                run = model.run(ids, keep="blocks.2.hook_resid_post")      # or layers.2.resid_post
                value = run.tensor("layers.2.resid_post")
                """,
            ),
            (
                "an attention pattern",
                """
                _, cache = bridge.run_with_cache(ids)
                value = cache["blocks.1.attn.hook_pattern"]
                """,
                """
                value = model.run(ids, keep="layers.1.attn.pattern").tensor("layers.1.attn.pattern")
                """,
            ),
            (
                "a head switched off",
                """
                def remove(z, hook):
                    z[:, :, 3] = 0
                    return z

                value = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", remove)])
                """,
                """
                value = model.run(ids, edits=[pl.Ablate("layers.1.attn.heads.3")]).logits
                """,
            ),
            (
                "a vector added",
                """
                vector = torch.linspace(-1, 1, 64)
                value = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.2.hook_resid_pre", lambda x, hook: x + vector)])
                """,
                """
                vector = torch.linspace(-1, 1, 64)
                value = model.run(ids, edits=[pl.Steer("layers.2.resid_pre", vector)]).logits
                """,
            ),
            (
                "activation patching, layers by positions",
                """
                from transformer_lens import patching
                _, cache = bridge.run_with_cache(ids)
                value = patching.get_act_patch_resid_pre(bridge, other, cache, lambda logits: logits[0, -1, 7] - logits[0, -1, 9])
                """,
                """
                found = pl.causal.patching(model, ids, other, over="layers.*.resid_pre@*",
                                           metric=pl.metrics.logit_difference(7, 9))
                value = torch.tensor(found["value"].values).squeeze()
                """,
            ),
        ],
    ),
    "nnsight": (
        "nnsight",
        """
        from nnsight import TransformersModel
        model = TransformersModel(module, tokenizer=tokenizer, task="text-generation")
        """,
        [
            (
                "values inside, saved",
                """
                with model.trace(ids):
                    value = model.transformer.h[2].mlp.output.save()
                """,
                """
                value = model.run(ids, keep="layers.2.mlp.out").tensor("layers.2.mlp.out")
                """,
            ),
            (
                "an edit",
                """
                with model.trace(ids):
                    model.transformer.h[1].mlp.output[:] = 0
                    value = model.output[0].save()
                """,
                """
                value = model.run(ids, edits=[pl.Ablate("layers.1.mlp.out")]).logits
                """,
            ),
            (
                "a value from another prompt",
                """
                with model.trace(ids):
                    there = model.transformer.h[1].input[:, 2].save()
                with model.trace(other):
                    model.transformer.h[1].input[:, 2] = there
                    value = model.output[0].save()
                """,
                """
                there = model.run(ids, keep="layers.1.resid_pre")
                value = model.run(other, edits=[pl.Patch("layers.1.resid_pre@2", there, source_at=2)]).logits
                """,
            ),
        ],
    ),
    "captum": (
        "captum",
        """
        from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, Saliency
        vectors = module.transformer.wte(ids).detach()
        forward = lambda x: module(inputs_embeds=x).logits[:, -1, 7]
        """,
        [
            (
                "gradient times input",
                """
                value = InputXGradient(forward).attribute(vectors.requires_grad_()).sum(-1)
                """,
                """
                value = torch.tensor(pl.attribution.gradient_x_input(model, ids, 7).values)
                """,
            ),
            (
                "integrated gradients",
                """
                value = IntegratedGradients(forward).attribute(vectors, torch.zeros_like(vectors), n_steps=64, method="gausslegendre").sum(-1)
                """,
                """
                value = torch.tensor(pl.attribution.integrated_gradients(model, ids, 7, baseline="zero", keep_first=False, steps=64).values)
                """,
            ),
            (
                "leaving out each token",
                """
                tokens = torch.arange(ids.shape[1])[None, :, None].expand_as(vectors)
                value = FeatureAblation(forward).attribute(vectors, torch.zeros_like(vectors), feature_mask=tokens)[..., 0]
                """,
                """
                value = torch.tensor(pl.attribution.occlusion(model, ids, 7, baseline="zero").values)
                """,
            ),
        ],
    ),
    "bertviz": (
        "bertviz",
        """
        """,
        [
            (
                "what is drawn",
                """
                from bertviz import head_view                     # head_view(attention, tokens) draws these
                attention = module(ids, output_attentions=True).attentions
                value = torch.stack(attention, 1)
                """,
                """
                patterns = pl.attention.patterns(model, ids)      # patterns.show() draws them, offline, with roles
                value = torch.tensor(patterns.values)
                """,
            )
        ],
    ),
    "pyvene": (
        "pyvene",
        """
        import pyvene as pv
        """,
        [
            (
                "an interchange at one position",
                """
                config = pv.IntervenableConfig([{"layer": 1, "component": "block_output", "intervention_type": pv.VanillaIntervention}])
                swapped = pv.IntervenableModel(config, module)
                _, out = swapped({"input_ids": other}, [{"input_ids": ids}], {"sources->base": 2})
                value = out.logits
                """,
                """
                source = model.run(ids, keep="layers.1.resid_post")
                value = model.run(other, edits=[pl.Patch("layers.1.resid_post@2", source, source_at=2)]).logits
                """,
            )
        ],
    ),
}
# said, not run: what would take weights or settings that cannot be had without a network
TOLD = {
    "SAELens": [
        ("a released dictionary", 'sae = SAE.from_pretrained(release, sae_id)\nfeatures = sae.encode(cache["blocks.8.hook_resid_pre"])',
         'sae = pl.neurons.dictionaries.SparseAutoencoder.load(folder)      # SAELens, sparsify, Gemma Scope ...\nmodel.run(prompt, keep=sae.sites("*"))                            # features are sites like any other'),
    ],
    "EasyEdit": [
        ("a fact rewritten by ROME", "editor = BaseEditor.from_hparams(ROMEHyperParams.from_hparams(file))\nmetrics, edited, _ = editor.edit(prompts=..., target_new=..., subject=...)",
         'C = KeyCovariance(layers=6).fit(model, texts)\nedited = pl.surgery.edit(model, Fact("The capital of {} is", "France", " Rome", " Paris"), covariance=C)\npl.surgery.scoreboard(edited, held_out)                           # and edited.undo()'),
    ],
    "repeng": [
        ("a control vector", "vector = ControlVector.train(control_model, tokenizer, dataset)\ncontrol_model.set_control(vector, 1.5)",
         'contrast = pl.safety.Contrast("layers.10:20.resid_post").fit(model, positive, negative)\nmodel.generate(prompt, edits=pl.safety.steer(contrast.vectors_, 1.5))   # import_vectors reads their GGUF files'),
    ],
}  # fmt: skip
ELSEWHERE = {  # why these are not a pair on the small GPT-2, and where both sides were run
    "SAELens": "Not run as a pair: the call takes released weights from a network. Both sides were run on dictionaries of random weights: with SAELens 6.54.12 "
    "activations and reconstructions agree within 2e-5 for five kinds ([dictionaries](dictionaries.md#files)).",
    "EasyEdit": "Not run as a pair: easyeditor 0.0.1.dev0, which PyPI has, asks at import for more than itself (`omegaconf` was the first that lacked) and was not taken further. "
    "Its ROME is run from a clone, beside ours on the same facts, by `benchmarks/facts_easyedit.py` ([facts](surgery.md#facts)).",
    "repeng": "Not run as a pair: repeng 0.4.0 is not imported beside numpy 2 (`np.float_`). With that name put back both sides were run by "
    "`benchmarks/safety_peers.py`: `pca_centred` is its `pca_diff` to a cosine of 1.000000, and GGUF files are read either way bit for bit ([safety](safety.md)).",
}
NAMES = {
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
    "captum": "Captum",
    "bertviz": "BertViz",
    "pyvene": "pyvene",
}


def run(python: str, program: str) -> list[float]:
    """The value a program leaves, flat, and its shape's length first. RuntimeError with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "value.json"
        code = f"{program}\nimport json\nvalue = value.detach().double()\njson.dump(value.reshape(-1).tolist(), open({str(file)!r}, 'w'))"
        done = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": "src",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "HOME": folder,
            },
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(file.read_text())


def compared(python: str, library: str) -> dict[str, str]:
    """What both sides of every pair gave: the largest difference, relative to the largest value."""
    _, opens, pairs = LIBRARIES[library]
    made = {}
    for what, theirs, ours in pairs:
        try:
            a = run(python, MODULE + TOKENIZER + dedent(opens) + dedent(theirs))
            b = run(sys.executable, OURS + dedent(ours))
            if len(a) != len(b):
                made[what] = f"{len(a)} numbers there, {len(b)} here"
                continue
            largest = max(map(abs, a)) or 1.0
            made[what] = (
                f"equal to {max(abs(x - y) for x, y in zip(a, b, strict=True)) / largest:.0e} of the largest of {len(a)} numbers"
            )
        except RuntimeError as error:
            made[what] = f"did not run: {error}"
        print(f"{library}: {what}: {made[what]}", flush=True)
    return made


def table(theirs: str, ours: str, there: str, here: str) -> str:
    return f"```python\n# {there}\n{dedent(theirs).strip()}\n```\n\n```python\n# {here}\n{dedent(ours).strip()}\n```\n"


def page(kept: dict[str, dict[str, str]]) -> str:
    parts = [
        "# Coming from another library\n",
        "Their call, then ours. Both were run on the same small seeded GPT-2 by `scripts/coming_from.py`, each library in an environment of its "
        "own; what the two sides gave is said beneath each pair. There `module` is the transformers model and `ids` its token ids; here "
        "`model = pl.load(module)`.\n",
    ]
    for library, (_, opens, pairs) in LIBRARIES.items():
        about = kept.get(library, {})
        parts.append(f"## {NAMES[library]}\n")
        parts.append(
            f"Version {about.get('version', 'not run')}, {about.get('date', '')}."
            + (
                f"\n\n```python\n# {NAMES[library]}: the model opened\n{dedent(opens).strip()}\n```\n"
                if opens.strip()
                else "\n"
            )
        )
        for what, theirs, ours in pairs:
            parts.append(f"**{what[0].upper()}{what[1:]}**: {about.get(what, 'not run')}.\n")
            parts.append(table(theirs, ours, NAMES[library], "pellucid"))
    for library, told in TOLD.items():
        parts.append(f"## {library}\n")
        parts.append(f"{ELSEWHERE[library]}\n")
        for what, theirs, ours in told:
            parts.append(f"**{what[0].upper()}{what[1:]}**\n")
            parts.append(table(theirs, ours, library, "pellucid"))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python", action="append", default=[], metavar="LIBRARY=PATH", help="an interpreter that has the library"
    )
    parser.add_argument("--write", action="store_true", help="write the page")
    given = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for each in given.python:
        library, _, python = each.partition("=")
        distribution = LIBRARIES[library][0]
        version = subprocess.run(
            [python, "-c", f"from importlib import metadata; print(metadata.version({distribution!r}))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        kept[library] = {
            "version": version,
            "date": date.today().isoformat(),
            "pellucid": metadata.version("pellucid"),
            **compared(python, library),
        }
    if given.write:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(page(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
