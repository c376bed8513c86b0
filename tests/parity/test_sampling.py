"""Our sampling steps against transformers' logits processors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.generate.sampling import SamplingParams, keep, penalize


def their_probabilities(logits: torch.Tensor, processors: list[object]) -> torch.Tensor:
    for processor in processors:
        logits = processor(torch.zeros(1, 1, dtype=torch.long), logits)  # type: ignore[operator]
    return logits.softmax(-1)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_kept_probabilities(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    theirs = [TemperatureLogitsWarper(temperature)]
    theirs += [TopKLogitsWarper(min(top_k, 50))] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [MinPLogitsWarper(min_p)] if min_p > 0 else []
    expected = their_probabilities(logits, theirs)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = keep(torch.softmax(logits[0] / temperature, -1), params)
    assert torch.allclose(kept / kept.sum(), expected, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    prompt, generated = torch.tensor([3, 4, 3]), torch.tensor([7, 3])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.cat([prompt, generated])[None], logits)[0]
    got = penalize(logits[0], SamplingParams(repetition_penalty=penalty), prompt, generated)
    assert torch.equal(got, expected)
