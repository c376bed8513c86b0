"""How large the learning rate is at each step, as a share of its peak."""

import math

from cabochon.train.config import TrainConfig


def schedule(step: int, config: TrainConfig) -> float:
    """The share for a step, counted from 0: linear warm-up, then what `config.schedule` names, down to `final_share`.

    wsd       warm-up, stable, decay (arXiv 2404.06395): flat, then linear over the last `decay_share` of the steps
    cosine    half a cosine from the end of the warm-up to the last step (arXiv 1608.03983)
    linear    a straight line over the same stretch
    constant  the peak throughout
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return warm
    start = (1 - config.decay_share) * config.steps if config.schedule == "wsd" else config.warmup_steps
    gone = min(1.0, max(0.0, (step + 1 - start) / max(1.0, config.steps - start)))
    if config.schedule == "cosine":
        gone = (1 - math.cos(math.pi * gone)) / 2
    return warm * (1 - gone * (1 - config.final_share))
