"""What `read` opens, what it leaves alone, and the one line it answers to everything it cannot open."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from pellucid.anatomy.fingerprint import weight_digest
from pellucid.anatomy.loading import read
from pellucid.errors import LoadError
from tests.models import minilm_path, smollm2_path

WORDS = ["<unk>", "the", "tower", "is", "in", "Paris"]
GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 0}
BERT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 6,
}
BART = {"d_model": 8, "vocab_size": 6, "encoder_layers": 1, "decoder_layers": 1} | {
    f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")
}
MODELS = {
    "causal-lm": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "masked-lm": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "seq2seq-lm": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "classification": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "base": lambda: BertModel(BertConfig(**BERT)),
}


def fast_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """The least Python tokenizer: no offset mapping."""

    vocab_size = 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


@pytest.fixture
def saved(tmp_path: Path):
    """Saves a tiny model with its tokenizer in a directory called `model`."""

    def save(kind: str = "causal-lm", **config: object) -> Path:
        folder = tmp_path / "model"
        MODELS[kind]().save_pretrained(folder)
        fast_tokenizer().save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return save


def refusal(source: object, **options: object) -> str:
    """The message `read` fails with: always one line."""
    with pytest.raises(LoadError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What opens


@pytest.mark.parametrize("kind", MODELS)
def test_a_directory_opens_with_the_head_it_was_saved_with(saved, kind):
    loaded = read(saved(kind))
    assert type(loaded.module) is type(MODELS[kind]())
    assert not loaded.module.training
    assert loaded.tokenizer("the tower").input_ids == [1, 2]
    assert loaded.revision is None


@pytest.mark.parametrize("kind", ["causal-lm", "masked-lm", "seq2seq-lm"])
def test_a_config_without_architectures_opens_with_the_head_the_weights_have(saved, kind):
    assert type(read(saved(kind, architectures=None)).module) is type(MODELS[kind]())


def test_a_guessed_head_without_weights_falls_back_to_the_bare_stack(tmp_path, saved):
    folder = saved("base", architectures=None)
    assert type(read(folder).module) is BertModel
    BertForQuestionAnswering(BertConfig(**BERT)).save_pretrained(folder)
    unnamed(folder)
    loaded = read(folder)
    assert type(loaded.module) is BertModel
    assert any("qa_outputs" in note for note in loaded.notes)


def unnamed(folder, name=None):
    """The class a directory says it was saved from is another, or none."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = name and [name]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering", "NextSentencePrediction", "PreTraining"])
def test_a_checkpoint_opens_as_the_very_class_it_was_saved_from(tmp_path, saved, kind):
    folder = saved("base")
    made = getattr(transformers, f"BertFor{kind}")(BertConfig(**BERT)).eval()
    made.save_pretrained(folder)
    loaded = read(folder)
    assert (type(loaded.module), loaded.notes) == (type(made), ())
    ids = torch.tensor([[1, 2, 3]])
    for value, own in zip(loaded.module(ids).values(), made(ids).values(), strict=True):
        torch.testing.assert_close(value, own)


def test_a_head_that_transformers_has_not_is_named_and_not_left_out(saved):
    folder = saved("masked-lm")
    unnamed(folder, "BertForTarot")
    message = refusal(folder)
    assert "saved from BertForTarot" in message
    assert "task='base'" in message
    loaded = read(folder, task="base")
    assert type(loaded.module) is BertModel
    assert any("cls.predictions" in note for note in loaded.notes)


def test_a_class_without_the_weights_of_its_head_is_refused_by_name(saved):
    folder = saved("base")
    unnamed(folder, "BertForTokenClassification")
    assert "no weights for classifier.bias, classifier.weight of BertForTokenClassification" in refusal(folder)


def test_a_pipeline_opens_with_its_model_and_tokenizer():
    module = transformers.BertForSequenceClassification(BertConfig(**BERT)).eval()
    made = transformers.pipeline("text-classification", model=module, tokenizer=fast_tokenizer())
    loaded = read(made)
    assert (loaded.module, loaded.tokenizer) == (module, made.tokenizer)


def test_a_directory_of_sentence_transformers_says_how_it_pools(saved):
    folder = saved("base")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    parts = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "1_Pooling").mkdir()
    for settings, pooling in [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean + max"),
    ]:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        assert read(folder).pooling == pooling


def test_a_named_task_overrides_the_checkpoint(saved):
    assert type(read(saved("masked-lm"), task="base").module) is BertModel


def test_a_saved_model_computes_what_it_computed_before(saved):
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    folder = saved()
    again = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert torch.equal(read(folder).module(ids).logits, again(ids).logits)


def test_dtype_follows_the_checkpoint_unless_named(saved, tmp_path):
    folder = saved()
    MODELS["causal-lm"]().to(torch.bfloat16).save_pretrained(folder)
    assert read(folder).dtype == torch.bfloat16
    assert read(folder, dtype="float32").dtype == read(folder, dtype=torch.float32).dtype == torch.float32


def test_device_and_device_map_place_the_module(saved):
    folder = saved()
    assert read(folder, device="meta").module.device.type == "meta"
    assert read(folder, device_map={"": "meta"}).module.device.type == "meta"


def test_a_module_in_memory_passes_through_untouched():
    module = MODELS["causal-lm"]().to(torch.float16).train()
    loaded = read(module, tokenizer=fast_tokenizer())
    assert loaded.module is module
    assert module.training
    assert loaded.dtype == torch.float16
    assert "evaluation mode" in loaded.notes[0]


def test_a_compiled_module_is_opened_inside_its_wrapper():
    module = MODELS["causal-lm"]().eval()
    loaded = read(torch.compile(module), tokenizer=fast_tokenizer())
    assert loaded.module is module
    assert "torch.compile" in loaded.notes[0]


def test_a_quantised_module_reports_the_dtype_it_computes_in():
    module = MODELS["base"]().eval()
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear})
    loaded = read(quantised, tokenizer=fast_tokenizer())
    assert loaded.dtype == torch.float32
    assert loaded.digest != weight_digest(module)


def test_a_tokenizer_can_come_from_another_directory(saved, tmp_path):
    fast_tokenizer().save_pretrained(tmp_path / "words")
    loaded = read(MODELS["causal-lm"](), tokenizer=tmp_path / "words")
    assert loaded.tokenizer("Paris").input_ids == [5]


def test_the_trained_encoder_opens_as_a_base_model():
    loaded = read(minilm_path())
    assert type(loaded.module) is BertModel
    assert len(loaded.module.encoder.layer) == 6


@pytest.mark.slow
def test_the_gguf_file_opens_in_float32_and_knows_where_the_eiffel_tower_is():
    loaded = read(smollm2_path())
    assert loaded.dtype == torch.float32
    ids = loaded.tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert loaded.tokenizer.decode(loaded.module(ids).logits[0, -1].argmax()) == " Paris"


def test_loading_prints_nothing_and_leaves_the_verbosity_as_it_was(saved, capsys):
    folder, level = saved("masked-lm"), transformers.logging.get_verbosity()
    capsys.readouterr()
    read(folder, task="base")  # transformers would print a bar and a load report
    assert capsys.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == level == logging.WARNING


# What is refused


def test_a_missing_model_is_refused_with_the_nearest_directory(saved, monkeypatch):
    folder = saved()
    assert "did you mean 'model'?" in refusal(folder.parent / "modell")
    assert "no such file or directory" in refusal("./nothing/here")
    monkeypatch.chdir(folder.parent)
    message = refusal("modle")
    assert "neither a directory here nor in the hub's cache" in message
    assert "did you mean 'model'?" in message


def test_a_pickle_only_directory_is_refused_with_the_safetensors_advice(saved):
    folder = saved()
    (folder / "model.safetensors").unlink()
    module = MODELS["causal-lm"]().eval()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "safetensors" in message
    assert "allow_pickle=True" in message
    assert weight_digest(read(folder, allow_pickle=True).module) == weight_digest(module)


def test_a_directory_without_weights_or_config_says_what_it_found(saved):
    folder = saved()
    (folder / "model.safetensors").unlink()
    assert "no weights in safetensors (found: config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    assert "pass the directory" in refusal(folder / "tokenizer.json")


def test_several_gguf_files_ask_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert "holds 2 GGUF files (a.gguf, b.gguf)" in refusal(tmp_path)


def test_a_broken_gguf_file_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"not a gguf file at all")
    assert "cannot open" in refusal(tmp_path)


def test_gguf_without_its_reader_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs gguf and accelerate: pip install 'pellucid[gguf]'" in refusal(tmp_path / "a.gguf")


def test_a_broken_config_or_weight_file_is_one_line(saved):
    folder = saved()
    (folder / "model.safetensors").write_bytes(b"junk")
    assert "cannot open" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(folder)


def test_code_in_a_checkpoint_does_not_run_unless_asked(saved):
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    folder = saved(model_type="own", auto_map=own)
    (folder / "own.py").write_text("from pathlib import Path\nPath('ran').write_text('')")
    assert "pass trust_remote_code=True" in refusal(folder)
    assert not Path("ran").exists()


def test_a_head_the_checkpoint_has_no_weights_for_is_refused_not_made_up(saved):
    folder = saved("base")
    message = refusal(folder, task="masked-lm")
    assert "would be random" in message
    assert "task=" in message


def test_an_impossible_or_unknown_task_names_the_possible_ones(saved):
    folder = saved()
    assert "has no masked-lm class" in refusal(folder, task="masked-lm")
    assert "did you mean 'causal-lm'" in refusal(folder, task="causal")


def test_a_missing_tokenizer_is_refused(saved):
    folder = saved()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer files" in refusal(folder)
    assert read(folder, tokenizer=fast_tokenizer()).tokenizer("in").input_ids == [4]


def test_a_slow_tokenizer_is_taken_and_what_is_none_is_refused():
    slow = SlowTokenizer()
    assert read(MODELS["causal-lm"](), tokenizer=slow).tokenizer is slow
    assert "a dict is no tokenizer" in refusal(MODELS["causal-lm"](), tokenizer={})


def test_a_model_opens_without_a_tokenizer(saved):
    loaded = read(MODELS["causal-lm"]())
    assert loaded.tokenizer is None and "opened without a tokenizer: it takes token ids" in loaded.notes
    assert read(saved("causal-lm"), tokenizer=False).tokenizer is None


def test_options_that_cannot_apply_are_refused(saved):
    folder = saved()
    assert "models on the hub" in refusal(folder, revision="main")
    assert "contradict" in refusal(folder, device="cpu", device_map="auto")
    assert "unknown dtype 'bfloat'" in refusal(folder, dtype="bfloat")
    assert "used as it is" in refusal(MODELS["base"](), tokenizer=fast_tokenizer(), dtype="float16")


# The hub, as it answers


@dataclass
class Hub:
    """Stands in for the hub: one model, one branch."""

    files: list[str]

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        errors = {
            "gated": GatedRepoError,
            "absent": RepositoryNotFoundError,
            "no/such id!": HFValidationError,
        }
        error = errors.get(name)
        if revision not in (None, "main"):
            error = RevisionNotFoundError
        if error:
            raise error.__new__(error, "a long\nstory")
        siblings = [SimpleNamespace(rfilename=file) for file in self.files]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("absent", None, "nor a model on the hub"),
        ("gated", None, "accept its terms"),
        ("here", "mian", "no revision 'mian'"),
        ("no/such id!", None, "nor a model on the hub"),
        ("here", None, "only as pickles"),
    ],
)
def test_each_answer_of_the_hub_has_its_own_line(monkeypatch, name, revision, says):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(["config.json", "pytorch_model.bin"]))
    assert says in refusal(name, revision=revision)


def test_without_a_connection_the_copy_in_the_cache_opens_with_its_commit(saved, monkeypatch, tmp_path):
    commit = tmp_path / "hub" / "models--me--tiny" / "snapshots" / ("a" * 40)
    commit.parent.mkdir(parents=True)
    saved().rename(commit)
    reference = tmp_path / "hub" / "models--me--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(commit.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = read("me/tiny")
    assert (loaded.name, loaded.revision) == ("me/tiny", commit.name)
    assert "at revision 'v2'" in refusal("me/tiny", revision="v2")


# The digest


def test_the_digest_tells_weights_apart_and_survives_saving(saved):
    torch.manual_seed(0)
    folder = saved()
    digest = read(folder).digest
    assert read(folder).digest == digest
    assert len(digest) == 16
    edited = read(folder).module
    with torch.no_grad():
        edited.transformer.h[0].mlp.c_proj.weight += torch.outer(torch.ones(32), torch.ones(8))
    assert weight_digest(edited) != digest
    assert weight_digest(edited.half()) != weight_digest(edited.float())


def test_the_digest_of_a_compiled_module_is_that_of_the_module():
    module = MODELS["causal-lm"]()
    assert weight_digest(torch.compile(module)) == weight_digest(module)
