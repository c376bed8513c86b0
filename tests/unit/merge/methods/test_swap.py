import torch
from hypothesis import given
from hypothesis import strategies as st
from trials import normal, patient, run, seeds

from cabochon.merge.methods.blocks import Block
from cabochon.merge.methods.swap import importance


@patient
@given(seed=seeds, t=st.floats(0, 3))
def test_nearswap_moves_by_t_at_most(seed: int, t: float) -> None:
    base, model = normal(seed, (3, 4)), normal(seed + 1, (3, 4))
    expected = base + (model - base).clamp(-t, t)
    torch.testing.assert_close(run("nearswap", [model], base, t=t), expected, rtol=1e-5, atol=1e-5)


@patient
@given(seed=seeds)
def test_fusion_takes_elements_from_one_or_the_other(seed: int) -> None:
    base, model = normal(seed, (6, 8)), normal(seed + 1, (6, 8))
    got = run("arcee_fusion", [model], base)
    scores = importance(Block((model,), base, 0)).flatten()
    ordered = scores.sort().values
    threshold = ordered[23] + 1.5 * (ordered[35] - ordered[11])
    chosen = (scores >= threshold).view(6, 8)
    torch.testing.assert_close(got, torch.where(chosen, model, base))
    assert chosen.float().mean() < 0.5


def test_what_changes_more_in_a_row_that_changes_more_is_more_important() -> None:
    base = torch.zeros(2, 3)
    model = torch.tensor([[0.1, 0.0, 0.0], [3.0, 0.1, 0.0]])
    scores = importance(Block((model,), base, 0))
    assert scores[1, 0] > scores[1, 1] > scores[0, 0] > scores[0, 1] == 0
