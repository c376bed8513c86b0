"""The presets' published figures, and the mapping to and from config.json."""

import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, CabochonError, UsageError
from cabochon.model.config import PRESETS, Gemma2Config


@pytest.mark.parametrize(("name", "embedding", "others"), [("2b", 590, 2.02), ("9b", 918, 8.32), ("27b", 1180, 26.05)])
def test_parameter_counts_of_the_report(name: str, embedding: int, others: float) -> None:
    config = Gemma2Config.preset(name)
    table = config.vocab_size * config.hidden_size
    assert round(table / 1e6) == pytest.approx(embedding, abs=1)
    assert (config.num_parameters - table) / 1e9 == pytest.approx(others, abs=0.006)


def test_27b_scales_queries_by_its_own_number() -> None:
    assert Gemma2Config.preset("27b").query_pre_attn_scalar == 4608 / 32 != Gemma2Config.preset("27b").head_dim
    assert Gemma2Config.preset("9b").query_pre_attn_scalar == 256  # first shipped elsewhere as 224


def test_even_layers_are_local() -> None:
    config = Gemma2Config.preset("2b")
    assert [config.window(i) for i in range(4)] == [4096, None, 4096, None]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    config = Gemma2Config.preset(name)
    assert Gemma2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_reads_what_transformers_4_wrote() -> None:
    raw = Gemma2Config.preset("9b").to_hf()
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    assert Gemma2Config.from_hf(raw) == Gemma2Config.preset("9b")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma3_text"},
        {"model_type": None},
        {"num_attention_heads": 3},
        {"head_dim": 7},
        {"hidden_size": 0},
        {"hidden_size": "2304"},
        {"hidden_size": True},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 2.5},
        {"query_pre_attn_scalar": float("nan")},
        {"attn_logit_softcapping": -50},
        {"rms_norm_eps": 0},
        {"hidden_activation": "relu"},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"layer_types": ["full_attention"] * 26},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": 5},
        {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
        {"bos_token_id": 256_000},
        {"eos_token_id": [1, "x"]},
        {"sliding_window": 0},
    ],
)
def test_another_architecture_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadInput) as caught:
        Gemma2Config.from_hf(Gemma2Config.preset("2b").to_hf() | change)
    assert len(str(caught.value).splitlines()) == 3


@given(
    st.dictionaries(st.sampled_from([*Gemma2Config.preset("2b").to_hf()]), st.from_type(object).filter(lambda x: True))
)
def test_any_change_is_understood_or_refused(change: dict[str, object]) -> None:
    with contextlib.suppress(CabochonError):
        Gemma2Config.from_hf(Gemma2Config.preset("2b").to_hf() | change)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'27b'"):
        Gemma2Config.preset("27B")


def test_needs_no_torch() -> None:
    program = "import sys, cabochon.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
