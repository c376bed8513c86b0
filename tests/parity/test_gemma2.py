"""Our model against transformers' Gemma 2 (eager attention), the same weights in both."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cabochon.generate.plain import PlainLoop
from cabochon.generate.sampling import SamplingParams
from cabochon.model.cache import KVCache
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from support import SMALL, configs, random_ids, reference_model, relative_error

LOGITS = 1e-5  # relative, float32


def last_bit_noise(theirs: Any, ids: torch.Tensor) -> float:
    """How far the reference's own logits move when its weights change in their last bit.

    Usually some 1e-6. A norm over a few numbers that nearly cancel can amplify any rounding further.
    """
    before = theirs(ids).logits
    kept = {name: p.clone() for name, p in theirs.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.mul_(1 + (torch.rand(p.shape, generator=draw) - 0.5) * 2.4e-7)
    moved = relative_error(theirs(ids).logits, before)
    for name, p in theirs.named_parameters():
        p.copy_(kept[name])
    return moved


def cached_logits(model: Gemma2, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits of a prompt that is fed in pieces of these lengths through the cache."""
    cache = KVCache(model.config, len(ids), ids.shape[1], dtype=model.embedding.weight.dtype)
    return torch.cat([model(part, cache=cache) for part in ids.split(pieces, dim=1)], dim=1)


@settings(max_examples=25, deadline=None)
@given(config=configs(), length=st.integers(1, 45), seed=st.integers(0, 99), data=st.data())
@torch.no_grad()
def test_logits_and_probabilities(config: Gemma2Config, length: int, seed: int, data: st.DataObject) -> None:
    ours, theirs = reference_model(config, seed)
    ids = random_ids(config, 2, length, seed)
    expected = theirs(ids).logits
    bound = max(LOGITS, 5 * last_bit_noise(theirs, ids))
    assume(bound < 1e-3)  # else the draw can show nothing
    assert relative_error(ours(ids), expected) < bound
    # Greedy decoding hides a missing final cap, which leaves the order alone: so probabilities too.
    assert relative_error(ours(ids).softmax(-1), expected.softmax(-1)) < 2 * bound
    first = data.draw(st.integers(1, length), label="first piece")
    for pieces in ([length], [1] * length, [first, length - first] if first < length else [length]):
        assert relative_error(cached_logits(ours, ids, pieces), expected) < bound


@torch.no_grad()
def test_both_caps_matter_in_these_tests() -> None:
    ours, _ = reference_model(SMALL)
    ids = random_ids(SMALL, 1, 30)
    expected = ours(ids)
    for off in ("attn_softcap", "final_softcap"):
        without = Gemma2(dataclasses.replace(SMALL, **{off: None})).eval()
        without.load_state_dict(ours.state_dict())
        assert relative_error(without(ids), expected) > 0.01, off


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@torch.no_grad()
def test_window_edge(window: int) -> None:
    """In one local layer position i depends on i - W + 1 and not on i - W; the reference agrees."""
    config = dataclasses.replace(SMALL, num_layers=1, sliding_window=window)
    ours, theirs = reference_model(config)
    ids, at = random_ids(config, 1, 40), 30
    for distance, seen in ((window, False), (window - 1, True)):
        changed = ids.clone()
        changed[0, at - distance] = (changed[0, at - distance] + 1) % config.vocab_size
        for model in (ours, lambda x: theirs(x).logits):
            moved = (model(changed)[0, at] - model(ids)[0, at]).abs().max()
            assert (moved > 1e-4) == seen, distance


@pytest.mark.parametrize("lengths", [(3, 17), (30, 4, 11), (1, 40)])
@torch.no_grad()
def test_unequal_prompts_side_by_side(lengths: tuple[int, ...]) -> None:
    ours, theirs = reference_model(SMALL)
    longest = max(lengths)
    rows = [random_ids(SMALL, 1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    positions = torch.stack([torch.arange(longest) - (longest - n) for n in lengths]).clamp_min(-1)
    together = ours(ids, positions)
    mask = (positions >= 0).long()
    reference = theirs(ids, attention_mask=mask, position_ids=positions.clamp_min(0)).logits
    for i, row in enumerate(rows):
        alone = theirs(row).logits[0]
        assert relative_error(together[i, -row.shape[1] :], alone) < LOGITS
        assert relative_error(reference[i, -row.shape[1] :], alone) < LOGITS


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("prompt_length", [3, 40])
def test_256_greedy_tokens(prompt_length: int, penalty: float) -> None:
    """Random weights soon repeat themselves; a repetition penalty keeps them walking through the vocabulary."""
    ours, theirs = reference_model(SMALL, seed=3)
    ids = random_ids(SMALL, 1, prompt_length)
    settings = {"max_new_tokens": 256, "repetition_penalty": penalty}
    expected = theirs.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
    loop = PlainLoop(ours, ids.tolist(), [SamplingParams(**settings)], frozenset())
    answer = [loop.step()[0].token for _ in range(256)]
    assert answer == expected[0, prompt_length:].tolist()
    assert penalty == 1 or len(set(answer)) > 30


@torch.no_grad()
def test_bf16_error_is_not_larger_than_the_references() -> None:
    config = dataclasses.replace(SMALL, hidden_size=96, intermediate_size=192, head_dim=32, num_layers=5)
    ours, theirs, error = [], [], lambda got, truth: float((got.float() - truth).abs().mean())
    for seed in range(24):
        exact, reference = reference_model(config, seed, size=0.08)
        ids = random_ids(config, 2, 40, seed)
        frequencies = reference.model.rotary_emb.inv_freq.clone()
        for model in (exact, reference):  # the truth: float32 arithmetic on weights that bf16 holds exactly
            model.to(torch.bfloat16).to(torch.float32)
        truth = exact(ids)
        ours.append(error(exact.to(torch.bfloat16)(ids), truth))
        reference.to(torch.bfloat16)
        reference.model.rotary_emb.inv_freq = frequencies  # float32, as loading a bf16 folder leaves them
        theirs.append(error(reference(ids).logits, truth))
    assert sum(ours) <= sum(theirs), (sum(ours), sum(theirs))
    assert sum(theirs) > 0


@torch.no_grad()
def test_embedding_scale_is_rounded_to_bf16() -> None:
    """sqrt(3584) = 59.866 is 59.75 in bf16; on 2b, sqrt(2304) = 48 is exact and would hide a mistake."""
    config = dataclasses.replace(SMALL, hidden_size=3584, num_layers=1)
    assert Gemma2(config).to(torch.bfloat16)._embedding_scale() == 59.75
    assert Gemma2(config)._embedding_scale() == pytest.approx(59.8665, abs=1e-4)
