"""The table of names and shapes, against the module it describes."""

import pytest
import torch
from hypothesis import given

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.weights.names import from_hf, is_harmless, shapes, to_hf
from support import SMALL, configs


@given(configs())
def test_shapes_are_those_of_the_module(config: Gemma2Config) -> None:
    with torch.device("meta"):
        module = Gemma2(config)
    assert dict(shapes(config)) == {name: tuple(p.shape) for name, p in module.named_parameters()}


@given(configs())
def test_names_go_there_and_back(config: Gemma2Config) -> None:
    ours = [name for name, _ in shapes(config)]
    theirs = [to_hf(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [from_hf(name) for name in theirs] == ours


def test_the_table_against_transformers() -> None:
    from transformers import Gemma2Config as TheirConfig
    from transformers import Gemma2ForCausalLM

    settings = {k: v for k, v in SMALL.to_hf().items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        theirs = Gemma2ForCausalLM(TheirConfig(**settings)).state_dict()
    expected = {name: tuple(t.shape) for name, t in theirs.items() if name != "lm_head.weight"}
    assert {to_hf(name): shape for name, shape in shapes(SMALL)} == expected


@pytest.mark.parametrize("name", ["", "lm_head.weight", "layers.0.attention.q.bias", "layers.x.mlp.up.weight"])
def test_an_unknown_name_is_an_error(name: str) -> None:
    for convert in (to_hf, from_hf):
        with pytest.raises(KeyError):
            convert(name)


def test_only_old_rotary_constants_are_harmless() -> None:
    assert is_harmless("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert is_harmless("model.rotary_emb.inv_freq")
    assert not is_harmless("model.layers.3.self_attn.q_proj.weight")
    assert not any(is_harmless(to_hf(name)) for name, _ in shapes(SMALL))
    assert not is_harmless("model_rotary_emb_inv_freq")
