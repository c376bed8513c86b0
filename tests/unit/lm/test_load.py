"""Models with adapters, by every way of naming them."""

import json

import pytest
import torch

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.cli.options import DeviceOptions, HubOptions, load_lm
from cabochon.lm import load
from cabochon.model.lora import LoraConfig, adapter_parameters, attach
from cabochon.weights.adapters import save_adapter
from cabochon.weights.hub import built_in
from cabochon.weights.save import save_model
from support import SMALL, random_ids, relative_error, small_model

IDS = random_ids(SMALL, 2, 9)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A base, an adapter that names it, and the logits of both together."""
    model = small_model()
    save_model(model, tmp_path / "base")
    attach(model, LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        logits = model(IDS)
    save_adapter(model, tmp_path / "adapter", base_model_name=str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path, logits


def rename_base(folder, name):
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(document | {"base_model_name_or_path": name}))


def test_an_adapter_goes_on_its_model(work, monkeypatch):
    folder, expected = work
    plain = load(folder / "base", device="cpu").logits(IDS)
    assert relative_error(plain, expected) > 0.1
    fetched = {"owner/base": folder / "base", "owner/adapter": folder / "adapter"}
    monkeypatch.setattr("cabochon.weights.hub._fetch", lambda repo, *_: fetched[repo])
    for model, adapter in (
        (folder / "base", folder / "adapter"),
        ("base", "adapter"),
        ("owner/base", "owner/adapter"),
        (folder / "adapter", None),
        ("owner/adapter", None),
    ):
        assert relative_error(load(model, adapter=adapter, device="cpu").logits(IDS), expected) < 1e-4
    rename_base(folder / "adapter", "owner/base")
    assert relative_error(load("adapter", device="cpu").logits(IDS), expected) < 1e-4


@pytest.mark.parametrize(
    ("base", "error", "told"),
    [
        (None, BadInput, "names none"),
        ("", BadInput, "names none"),
        ("gone", MissingResource, "not a Hub id"),
        ("./gone", MissingResource, "there is no such folder"),
        ("adapter", BadInput, "no config.json"),
    ],
)
def test_a_base_that_is_not_there_is_told(work, base, error, told):
    folder, _ = work
    rename_base(folder / "adapter", base)
    with pytest.raises(error) as refused:
        load(folder / "adapter", device="cpu")
    assert "the adapter in" in refused.value.what
    assert told in refused.value.cause
    assert "--adapter" in refused.value.hint


def test_a_tokenizer_beside_the_adapter_serves_where_the_model_has_none(work):
    folder, _ = work
    assert load("base", device="cpu").tokenizer is None
    (folder / "adapter" / "tokenizer.json").write_bytes((built_in() / "tokenizer.json").read_bytes())
    with pytest.raises(BadInput, match="tokenizer"):  # that of the model inside has more tokens than this model
        load("base", adapter="adapter", device="cpu")


def test_the_flag_gets_there(work):
    folder, expected = work
    lm = load_lm("base", HubOptions(), DeviceOptions(adapter=str(folder / "adapter"), device="cpu"))
    assert relative_error(lm.logits(IDS), expected) < 1e-4


def test_two_adapters_are_one_too_many(work):
    folder, _ = work
    with pytest.raises(UsageError, match="both are adapters"):
        load(folder / "adapter", adapter=folder / "adapter")
    with pytest.raises(MissingResource, match="no adapter in nowhere"):
        load(folder / "base", adapter="nowhere")
