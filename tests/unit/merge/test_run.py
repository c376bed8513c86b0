"""A merge from its configuration to a folder: tokenizers, templates, cards, and what the plan says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from cabochon.base.errors import BadInput, MissingResource
from cabochon.merge.parse import parse_config
from cabochon.merge.run import Merge
from cabochon.model.config import Gemma2Config
from cabochon.weights.folder import load_model
from cabochon.weights.init import init_folder

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32,
    query_pre_attn_scalar=8,
)  # fmt: skip
MEAN = """
models: [{{model: {0}/a}}, {{model: {0}/b}}]
merge_method: linear
parameters: {{weight: 1}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a and b; b has a token more."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        init_folder(CONFIG, folder / name, dtype=torch.float32, seed=seed)
    path = folder / "b/tokenizer.json"
    document = json.loads(path.read_text())
    more = {**document["added_tokens"][-1], "id": 4095, "content": "<more>"}
    (last,) = [token for token, i in document["model"]["vocab"].items() if i == 4095]
    del document["model"]["vocab"][last]
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if last not in ("".join(pair), *pair)]
    document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] != 4095] + [more]
    path.write_text(json.dumps(document))
    return folder


def test_without_a_word_about_tokenizers_embeddings_are_merged_row_by_row(models: Path, tmp_path: Path) -> None:
    Merge.prepare(parse_config(MEAN.format(models))).write(tmp_path / "out")
    a, b, out = (load_model(path).embedding.weight for path in (models / "a", models / "b", tmp_path / "out"))
    torch.testing.assert_close(out, (a + b) / 2)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (models / "a/tokenizer.json").read_bytes()


def test_a_union_puts_tokens_side_by_side(models: Path, tmp_path: Path) -> None:
    text = MEAN.format(models) + "tokenizer: {source: union, pad_to_multiple_of: 128}\n"
    Merge.prepare(parse_config(text)).write(tmp_path / "out")
    a, b, out = (load_model(path).embedding.weight for path in (models / "a", models / "b", tmp_path / "out"))
    ids = {t["content"]: t["id"] for t in json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]}
    assert len(out) == 4224 and ids["<more>"] == 4096
    torch.testing.assert_close(out[:4095], (a[:4095] + b[:4095]) / 2)
    torch.testing.assert_close(out[4096], b[4095])  # a lacks it and takes b's


def test_a_chat_template_is_written(models: Path, tmp_path: Path) -> None:
    first = json.loads((models / "a/tokenizer_config.json").read_text())["chat_template"].strip()
    for name, choice, wanted in (("one", "auto", first), ("two", "'{{ mine }}'", "{{ mine }}")):
        Merge.prepare(parse_config(MEAN.format(models) + f"chat_template: {choice}\n")).write(tmp_path / name)
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text())["chat_template"] == wanted


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"}]  # fmt: skip
RENDERED = {
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "chatml": "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
    "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "alpaca": "<bos>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo<eos>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_by_its_name_is_what_transformers_renders(name: str, models: Path, tmp_path: Path) -> None:
    work = Merge.prepare(parse_config(MEAN.format(models) + f"chat_template: {name}\n"))
    marks = [note for note in work.plan.notes if "<|im_start|>" in note]
    assert len(marks) == (name == "chatml")  # these tokenizers have no such tokens
    work.write(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = CHAT[1:] if name == "gemma" else CHAT
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == RENDERED[name]


@pytest.mark.parametrize(
    ("choice", "said"), [("llama3", "other control tokens"), ("chatlm", "did you mean chatml?"), ("x", "auto, gemma")]
)
def test_templates_that_are_refused(choice: str, said: str, models: Path) -> None:
    with pytest.raises(BadInput) as caught:
        Merge.prepare(parse_config(MEAN.format(models) + f"chat_template: {choice}\n"))
    assert said in str(caught.value)


def test_of_several_templates_the_default_counts(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "c")
    path = tmp_path / "c/tokenizer_config.json"
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": " {{ yes }} "}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    text = f"models: [{{model: {tmp_path}/c}}]\nmerge_method: passthrough\nchat_template: auto\n"
    assert (
        json.loads(Merge.prepare(parse_config(text)).tokenizer["tokenizer_config.json"])["chat_template"] == "{{ yes }}"
    )


def test_layers_that_change_their_kind_are_mentioned(models: Path) -> None:
    text = f"""
slices:
  - sources: [{{model: {models}/a, layer_range: [0, 3]}}]
  - sources: [{{model: {models}/b, layer_range: [2, 4]}}]
merge_method: passthrough
"""
    plan = Merge.prepare(parse_config(text)).plan
    assert plan.shape.num_layers == 5 and any("window" in note for note in plan.notes)


def test_a_parameter_of_other_methods_is_left_out_with_a_note(models: Path) -> None:
    plan = Merge.prepare(parse_config(MEAN.format(models).replace("weight: 1", "weight: 1, int8_mask: true"))).plan
    assert plan.notes == ("int8_mask means nothing to linear and is left out",)


def test_warp_measures_whole_layers_and_ends_at_its_ends(models: Path, tmp_path: Path) -> None:
    start = f"base_model: {models}/a\nmodels: [{{model: {models}/b}}]\ndtype: float32\n"
    b = load_model(models / "b").state_dict()
    for text in ("merge_method: warp\nparameters: {eta: 1}\n", "merge_method: warp_slerp\n"):
        out = tmp_path / text[14:18].strip() / str(len(text))
        Merge.prepare(parse_config(start + text)).write(out)
        merged = load_model(out).state_dict()
        for name in b:
            torch.testing.assert_close(merged[name], b[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_is_put_on_its_model(models: Path, tmp_path: Path) -> None:
    name, (a, b) = "model.layers.1.self_attn.q_proj", (torch.randn(2, 16), torch.randn(16, 2))
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    text = f"models: [{{model: {models}/a+{tmp_path}/lora}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    Merge.prepare(parse_config(text)).write(tmp_path / "out", threads=2)
    start, out = load_model(models / "a").state_dict(), load_model(tmp_path / "out").state_dict()
    start["layers.1.attention.q.weight"] = start["layers.1.attention.q.weight"] + 3 * b @ a
    for tensor in start:
        torch.testing.assert_close(out[tensor], start[tensor])
    with pytest.raises(MissingResource, match="no adapter in nowhere"):
        Merge.prepare(parse_config(text.replace(f"{tmp_path}/lora", "nowhere")))
