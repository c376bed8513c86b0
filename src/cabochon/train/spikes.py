"""Steps whose loss jumps are left out before they do harm, as PaLM's training did by hand (arXiv 2204.02311, 5.1).

A loss counts as a spike when it is further above the median of the last ones than `factor` times their usual
distance from it. The median and not the mean, so that one spike does not hide the next.
"""

import math
import statistics
from typing import Any

from cabochon.base.errors import BadInput
from cabochon.train.config import TrainConfig

LEAST = 16  # losses that have to be known before one can stand out
_USUAL = 1.4826  # a normal distribution's standard deviation, over its median distance from the median


class Diverged(BadInput):
    """The loss is no number any more. The weights are those of the last step that had one."""


class SpikeWatch:
    """The last losses, and how many steps in a row were left out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.skipped = 0

    def leave_out(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and gradient norm is to change nothing.

        Raises:
            Diverged: the loss was no number for `max_skipped` steps in a row.
        """
        sound = math.isfinite(loss) and math.isfinite(norm)
        if not sound and self.skipped >= self.config.max_skipped:
            raise Diverged(
                "training stopped: the loss is not a number",
                f"{self.skipped + 1} steps in a row gave a loss of {loss} and a gradient of length {norm}",
                "try a lower learning rate or a longer warm-up, and look at the data",
            )
        if not sound or (self._jumps(loss) and self.skipped < self.config.max_skipped):
            self.skipped += 1
            return True
        self.skipped = 0
        self.losses = [*self.losses, loss][-self.config.spike_window :]
        return False

    def _jumps(self, loss: float) -> bool:
        if self.config.spike_factor <= 0 or len(self.losses) < LEAST:
            return False
        middle = statistics.median(self.losses)
        spread = _USUAL * statistics.median(abs(past - middle) for past in self.losses)
        # A loss that hardly moves has no spread to speak of: a hundredth of it is never a spike.
        return loss > middle + self.config.spike_factor * max(spread, 0.01 * abs(middle))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": self.losses, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """The way back of `state`."""
        self.losses, self.skipped = [float(loss) for loss in state["losses"]], int(state["skipped"])
