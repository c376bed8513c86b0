"""Merges of adapters from a file to a folder: what is read, refused, written, and what PEFT's users find in it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cabochon.base.errors import BadInput
from cabochon.cli.main import main
from cabochon.merge.adapter_parse import AdapterConfig, AdapterSource, parse_adapters, read_either
from cabochon.merge.adapter_run import AdapterMerge
from cabochon.merge.config import ModelRef
from cabochon.model.config import Gemma2Config
from cabochon.weights.adapters import read_adapter
from cabochon.weights.init import init_folder

GOLDEN = Path(__file__).parents[2] / "golden/merge/weighted"
DORA = GOLDEN.parent / "adapters/dora"
CONFIG = Gemma2Config(
    vocab_size=24, hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, intermediate_size=14,
    query_pre_attn_scalar=6, sliding_window=8, max_position=32,
)  # fmt: skip
V = "layers.{}.attention.v.weight"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    init_folder(CONFIG, tmp_path / "base", dtype=torch.float32, tokenizer=False)
    return tmp_path


def text(method: str = "cat", more: str = "", one: str = "{weight: 0.5}", two: str = "{weight: -2}") -> str:
    return (
        f"adapters:\n  - {{adapter: {GOLDEN}/one, parameters: {one}}}\n"
        f"  - {{adapter: {GOLDEN}/two, parameters: {two}}}\nmerge_method: {method}\nbase_model: base\n{more}"
    )


def test_what_is_read() -> None:
    found = parse_adapters(text("ties", "majority_sign_method: frequency\nparameters: {density: [0.2, 0.4]}\n"))
    assert found.combination.name == "ties" and found.majority == "frequency" and found.base == ModelRef("base")
    assert found.sources[1] == AdapterSource(f"{GOLDEN}/two", None, {"weight": -2})
    settings = [found.settings(f"layers.{i}.mlp.up.weight", [1], 3, 0) for i in range(3)]
    assert [s.per_model["density"][0] for s in settings] == pytest.approx([0.2, 0.3, 0.4])
    assert {s.per_model["weight"] for s in settings} == {(-2.0,)} and len({s.seed for s in settings}) == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("merge_method: cat", "merge_method: tise"), "did you mean ties?"),
        (("merge_method: cat", "merge_method: slerp"), "choose one of cat, svd, linear"),
        (("weight: 0.5", "wieght: 0.5"), "did you mean weight?"),
        (("weight: 0.5", "weight: 0.5, density: 1"), "density is unknown to cat"),
        (("adapter:", "adaptor:"), "did you mean adapter?"),
        (("base_model: base", "base_modle: base"), "did you mean base_model?"),
        (("base_model: base", "base_model: base+lora"), "an adapter of its own"),
        (("base_model: base", "majority_sign_method: most"), "total or frequency"),
        (("base_model: base", "models: [{model: a}]"), "the key models is unknown"),
        ((f"adapter: {GOLDEN}/one, ", ""), "adapters[0].adapter"),
        (("0.5", "!!python/name:os.system 0.5"), "constructor"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_place(changed: tuple[str, str], said: str) -> None:
    assert changed[0] in text()
    with pytest.raises(BadInput) as caught:
        parse_adapters(text().replace(*changed), "my.yml")
    assert said in str(caught.value) and "my.yml" in caught.value.what


def test_a_file_of_models_is_read_as_one(work: Path) -> None:
    Path("a.yml").write_text(text())
    Path("m.yml").write_text("models: [{model: base}]\nmerge_method: passthrough\n")
    assert isinstance(read_either(Path("a.yml")), AdapterConfig)
    assert not isinstance(read_either(Path("m.yml")), AdapterConfig)


def test_weights_can_differ_by_layer_and_by_name(work: Path) -> None:
    own = "{weight: [{filter: v_proj, value: [0, 2]}, {value: 1}]}"
    merged = AdapterMerge.prepare(parse_adapters(text(one=own, two="{weight: 0}"))).merge()
    one = read_adapter(GOLDEN / "one", CONFIG)
    for layer, weight in ((0, 0.0), (1, 2.0)):
        part = one.deltas[V.format(layer)]
        torch.testing.assert_close(merged.delta(V.format(layer)), weight * part.b @ part.a)


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("merge.yml").write_text(text("svd", "parameters: {rank: 2}\n"))
    assert main(["merge", "merge.yml", "--dry-run"]) == 0
    assert "svd of 2 adapters for base: 5 matrices" in capsys.readouterr().out and not Path("out").exists()
    assert main(["merge", "merge.yml", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["lost"] < 1 and found["matrices"] == 5
    written = read_adapter(Path("out"), CONFIG)
    assert written.settings.r == 2 and written.settings.base_model == "base"
    assert {tensor.dtype for tensor in load_file("out/adapter_model.safetensors").values()} == {torch.float32}
    card = Path("out/README.md").read_text()
    assert "`svd`" in card and "rank: 2" in card and "weight: -2" in card and "was cut off" in card
    assert main(["merge", "merge.yml", "out"]) == 2  # it is there
    assert main(["merge", "merge.yml", "out", "--overwrite"]) == 0
    assert main(["merge", "merge.yml"]) == 2
    assert sorted(path.name for path in work.iterdir()) == ["base", "merge.yml", "out"]
    Path("use.yml").write_text("models: [{model: base+out}]\nmerge_method: passthrough\n")
    assert main(["merge", "use.yml", "model"]) == 0


@pytest.mark.parametrize("flags", [["--inspect"], ["--threads", "2"], ["--hashes"], ["--shard-size", "1"]])
def test_flags_for_models_alone(work: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("merge.yml").write_text(text())
    assert main(["merge", "merge.yml", "out", *flags]) == 2
    assert flags[0] in capsys.readouterr().err and not Path("out").exists()


def test_random_ones_depend_on_the_seed_alone(work: Path) -> None:
    config = parse_adapters(text("dare_ties", "parameters: {density: 0.5}\n"))
    one, again, other = (AdapterMerge.prepare(config, seed=seed).merge() for seed in (1, 1, 2))
    name = V.format(0)
    assert torch.equal(one.delta(name), again.delta(name)) and not torch.equal(one.delta(name), other.delta(name))


def test_the_model_is_the_one_that_the_adapter_names(work: Path) -> None:
    without = text().replace("base_model: base\n", "")
    with pytest.raises(BadInput, match="does not say what model"):
        AdapterMerge.prepare(parse_adapters(without))
    folder = work / "named"
    folder.mkdir()
    settings = json.loads((GOLDEN / "one/adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes((GOLDEN / "one/adapter_model.safetensors").read_bytes())
    work_ = AdapterMerge.prepare(parse_adapters(without.replace(f"{GOLDEN}/one", "named")))
    assert work_.base == ModelRef("base") and any("different models" in note for note in work_.notes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (text().replace(f"{GOLDEN}/two", str(DORA)), "it uses DoRA"),
        (text(two="{}"), "needs weight"),
        (text("ties", "parameters: {density: 1.5}\n"), "from 0 to 1"),
        (text("svd", "parameters: {rank: 1.5}\n"), "whole number"),
        (text("svd", "parameters: {rank: 0}\n"), "at least 1"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_is(work: Path, config: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        AdapterMerge.prepare(parse_adapters(config))
    assert said in str(caught.value)
