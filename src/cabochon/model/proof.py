"""Crafted inputs on which an attention backend shows whether its cap, window, scale and mask are real.

Random inputs of unit size hardly reach a cap of 50, and a prompt of ten tokens never leaves a window of 4096:
on them a backend that ignores both looks right. Here every feature decides the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.model.visibility import NOTHING, Visibility

SOFTCAP, SCALE = 50.0, 0.31  # a scale that is no power of the head size
KEYS, WINDOW, PADDING = 12, 4, 5  # few, so that the oracle's loops take milliseconds
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Probe:
    """One feature and an input on which leaving it out changes the answer beyond any rounding."""

    feature: str
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Visibility


def failures(
    backend: Callable[[Tensor, Tensor, Tensor, Visibility, float, float | None], Tensor],
    device: str,
    dtype: torch.dtype,
    *,
    with_softcap: bool = True,
    whole_texts_only: bool = False,
) -> list[str]:
    """The features that a backend gets wrong on this device; an empty list is a pass. Takes milliseconds.

    With `whole_texts_only` it is not asked for padding and packed documents, which it never meets.
    """
    cap = SOFTCAP if with_softcap else None
    asked = probes(device, dtype)
    if whole_texts_only:
        asked = [probe for probe in asked if probe.feature not in ("padding", "documents")]
    wrong = []
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for probe in asked:
            expected = oracle(probe.q, probe.k, probe.v, probe.visible, SCALE, cap)
            answer = backend(probe.q, probe.k, probe.v, probe.visible, SCALE, cap).float()
            if not torch.allclose(answer, expected, rtol=0, atol=TOLERANCE[dtype]):
                wrong.append(probe.feature)
    return wrong


def probes(device: str, dtype: torch.dtype) -> list[Probe]:
    """The crafted inputs, heads grouped two to one, head size 16."""
    ahead = torch.arange(KEYS, device=device)[None]
    late = ahead[:, -3:]  # queries that come after more keys than the window holds, as when decoding
    padded = torch.cat([ahead, torch.where(ahead < PADDING, NOTHING, ahead - PADDING)])
    everything = Visibility(ahead, ahead, None)
    return [
        Probe("soft cap", *_saturated(device, dtype), everything),
        Probe("scale", *_inputs(KEYS, KEYS, 1, 1.0, device, dtype), everything),
        # Equal scores: each value counts the same, so one key too many or too few shows at once.
        Probe("window edge", *_inputs(KEYS, KEYS, 1, 0.0, device, dtype), Visibility(ahead, ahead, WINDOW)),
        Probe(
            "window beyond the prompt",
            *_inputs(3, KEYS, 1, 0.0, device, dtype),
            Visibility(late, ahead, WINDOW),
        ),
        Probe("padding", *_inputs(KEYS, KEYS, 2, 1.0, device, dtype), Visibility(padded, padded, WINDOW)),
        Probe("documents", *_inputs(KEYS, KEYS, 1, 1.0, device, dtype), _two_documents(ahead)),
    ]


def _two_documents(positions: Tensor) -> Visibility:
    document = (positions >= PADDING).long()
    restarted = positions - PADDING * document
    return Visibility(restarted, restarted, None, document, document)


def _saturated(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores up to +-300: without the cap a single key wins, with it several share.

    Entries of -8, 0 and 8 make every product q k exact in bfloat16, so that a score's own rounding, which
    is large at this size, cannot hide or imitate a missing cap.
    """
    q, k, v = _inputs(KEYS, KEYS, 1, 1.0, device, torch.float32)
    return (q.sign() * (q.abs() > 0.4) * 8).to(dtype), (k.sign() * (k.abs() > 0.4) * 8).to(dtype), v.to(dtype)


def _inputs(
    queries: int, keys: int, batch: int, size: float, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Reproducible q [B, 4, T, 16], k and v [B, 2, S, 16]; `size` is the standard deviation of the scores."""
    draw = torch.Generator().manual_seed(2408_00118)
    q, k, v = (torch.randn(batch, n, t, 16, generator=draw) for n, t in ((4, queries), (2, keys), (2, keys)))
    q = q * (size / (SCALE * 4))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def oracle(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """The formula once more in float32, written to share nothing with the backends: a loop over queries."""
    q, k, v = q.float(), k.float(), v.float()
    answer = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            keys = [s for s in range(k.shape[2]) if _sees(visible, b, t, s)]
            for n in range(q.shape[1] if keys else 0):
                scores = k[b, n // group, keys] @ q[b, n, t] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                answer[b, n, t] = torch.softmax(scores, 0) @ v[b, n // group, keys]
    return answer


def _sees(visible: Visibility, b: int, t: int, s: int) -> bool:
    i, j = int(visible.query_positions[b, t]), int(visible.key_positions[b, s])
    same = visible.query_documents is None or visible.key_documents is None
    same = same or int(visible.query_documents[b, t]) == int(visible.key_documents[b, s])  # type: ignore[index]
    return same and j != NOTHING and j <= i and (visible.window is None or i - j < visible.window)
