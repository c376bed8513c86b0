"""Whole merges equal mergekit's: how its configurations are read, and what comes out for every tensor."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cabochon.cli.main import main
from cabochon.merge.parse import parse_config
from cabochon.merge.run import Merge
from cabochon.text.chat import CHAT_TEMPLATE
from cabochon.weights.folder import load_model
from cabochon.weights.hub import built_in

GOLDEN = Path(__file__).parents[1] / "golden/merge/whole"
_spec = importlib.util.spec_from_file_location("whole_make", GOLDEN / "make.py")
assert _spec and _spec.loader
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("name", make.CONFIGS)
def test_a_configuration_means_what_it_means_to_mergekit(name: str, tmp_path: Path) -> None:
    make.write_models(tmp_path)
    work = Merge.prepare(parse_config(make.configuration(name, tmp_path)))
    work.write(tmp_path / "out", threads=2)
    got, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(GOLDEN / f"{name}.safetensors")
    assert got.keys() == wanted.keys()
    for tensor, values in wanted.items():
        torch.testing.assert_close(got[tensor], values, rtol=1e-5, atol=1e-6, msg=lambda m, t=tensor: f"{t}: {m}")
    assert load_model(tmp_path / "out").config.num_layers == work.plan.shape.num_layers


def test_the_bits_do_not_depend_on_threads_and_shards(tmp_path: Path) -> None:
    make.write_models(tmp_path)
    work = Merge.prepare(parse_config(make.configuration("ties", tmp_path)))
    work.write(tmp_path / "one", threads=1)
    work.write(tmp_path / "three", threads=3, shard_bytes=2000)
    one, three = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "three").state_dict()
    assert len(list((tmp_path / "three").glob("*.safetensors"))) > 3
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_a_seed_decides_what_is_dropped(tmp_path: Path) -> None:
    make.write_models(tmp_path)
    text = make.configuration("ties", tmp_path).replace("merge_method: ties", "merge_method: dare_ties")
    embeddings = []
    for number, seed in enumerate((1, 1, 2)):
        Merge.prepare(parse_config(text), seed=seed).write(tmp_path / str(number))
        embeddings.append(load_model(tmp_path / str(number)).embedding.weight)
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])


def test_a_merge_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model inside, merged with a copy of itself, answers as it does."""
    copied = shutil.copytree(built_in(), tmp_path / "copied")
    text = f"models: [{{model: {built_in()}}}]\nbase_model: {copied}\nmerge_method: slerp\nparameters: {{t: 0.5}}\n"
    Merge.prepare(parse_config(text)).write(tmp_path / "out")
    answers = []
    for model in ([], [str(tmp_path / "out")]):
        assert main(["run", *model, "What is 2 + 2?", "--max-new-tokens", "12"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_transformers_loads_a_merge_and_answers_the_same(tmp_path: Path) -> None:
    make.write_models(tmp_path)
    Merge.prepare(parse_config(make.configuration("passthrough", tmp_path))).write(tmp_path / "out", shard_bytes=4000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.tensor([[2, 5, 7, 11, 13, 17, 19, 23] * 4])
    with torch.inference_mode():
        ours = load_model(tmp_path / "out").eval()(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)
