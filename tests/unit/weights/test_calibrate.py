"""Calibration block by block: what each layer is rounded for, in which order, and that the model gains from it."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import saved
from torch.nn.functional import pad

from cabochon.base.errors import UsageError
from cabochon.data.pack import Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import fake_quantize
from cabochon.weights import calibrate
from cabochon.weights.calibrate import calibrated
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.names import to_hf
from cabochon.weights.quantize import quantize_folder
from cabochon.weights.read import Reader
from cabochon.weights.scheme import Scheme, layout
from cabochon.weights.verify import verify
from support import SMALL, random_ids, small_model

SCHEME = Scheme(4, 32, "gptq")  # the embedding too


def batch(count: int = 4, length: int = 24, seed: int = 0) -> Batch:
    ids = random_ids(SMALL, count, length, seed=seed)
    return Batch(ids, ids, torch.zeros_like(ids))


def streamed(folder: Path, batches: Any, scheme: Scheme = SCHEME) -> dict[str, torch.Tensor]:
    reader = Reader(verify(folder))
    return dict(calibrated(reader, SMALL, scheme, batches=batches))


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(4, 64, "gptq", 8)], ids=str)
def test_every_tensor_in_the_order_of_the_layout(tmp_path: Path, scheme: Scheme) -> None:
    saved(tmp_path)
    got = streamed(tmp_path, [batch()], scheme)
    assert [(name, tuple(t.shape)) for name, t in got.items()] == [(t.name, t.shape) for t in layout(SMALL, scheme)]


@torch.inference_mode()
def test_a_calibrated_model_is_nearer_to_the_original(tmp_path: Path) -> None:
    """On tokens that it was not calibrated on, over all logits."""
    save_model(small_model(SMALL, size=0.1), tmp_path / "m")
    batches = [batch(8, 40, seed=i) for i in range(8)]
    quantize_folder(tmp_path / "m", tmp_path / "q", SCHEME, tensors=partial(calibrated, batches=batches))
    ids = random_ids(SMALL, 16, 40, seed=99)
    truth = load_model(tmp_path / "m")(ids)
    models = load_model(tmp_path / "q"), load_model(tmp_path / "m", weights="int4", group=32)
    ours, plain = (float((model(ids) - truth).square().mean()) for model in models)
    assert ours < 0.8 * plain


@torch.no_grad()
def test_what_a_layer_is_rounded_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer by hand: inputs from the packed embedding, normed, and rounded as the kernels will."""
    saved(tmp_path)
    seen: list[torch.Tensor] = []
    original = calibrate.gptq
    monkeypatch.setattr(calibrate, "gptq", lambda w, h, g: seen.append(h) or original(w, h, g))
    got = streamed(tmp_path, [batch(seed=1), batch(2, 9, seed=2)])
    assert len(seen) == 7 * SMALL.num_layers
    assert seen[0] is seen[1] is seen[2]  # q, k and v take the same input
    model = Gemma2(SMALL)
    layer = calibrate.QuantEmbedding(SMALL.vocab_size, SMALL.hidden_size, 4, 32)
    layer.load_state_dict({n: got[f"embedding.{n}"] for n in ("weight", "scale", "zero")})
    model.set_submodule("embedding", layer)
    norm = model.layers[0].pre_attention_norm  # type: ignore[union-attr]
    norm.weight.copy_(got["layers.0.pre_attention_norm.weight"])  # type: ignore[union-attr, operator]
    expected = torch.zeros(40, 40)
    for part in (batch(seed=1), batch(2, 9, seed=2)):
        x = norm(model.embed(part.ids)).flatten(0, 1)  # type: ignore[operator]
        x = fake_quantize(pad(x, (0, 24)), 32)[:, :40]
        expected += x.t() @ x
    assert torch.allclose(seen[0], expected, rtol=1e-4, atol=1e-2)


def test_each_layer_meets_what_the_rounded_ones_before_it_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all earlier weights ruined on purpose, `down` of the last block is rounded for other inputs."""
    saved(tmp_path)
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    original = calibrate.gptq
    for ruined, kept in found.items():

        def record(w: Any, h: Any, g: Any, kept: Any = kept, ruined: bool = ruined) -> Any:
            kept.append(h)
            return original(w * 0 if ruined and len(kept) == 5 else w, h, g)  # the second stage of the feed-forward

        monkeypatch.setattr(calibrate, "gptq", record)
        streamed(tmp_path, [batch()])
    same = [torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True)]
    assert same == [i < 6 for i in range(7 * SMALL.num_layers)]


def test_documents_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    one, two = random_ids(SMALL, 1, 10, seed=1), random_ids(SMALL, 1, 10, seed=2)
    packed = torch.cat([one, two], 1)
    apart = [Batch(i, i, torch.zeros_like(i)) for i in (one, two)]
    together = Batch(packed, packed, torch.tensor([[0] * 10 + [1] * 10]))
    seen: list[torch.Tensor] = []
    original = calibrate.gptq
    monkeypatch.setattr(calibrate, "gptq", lambda w, h, g: seen.append(h) or original(w, h, g))
    streamed(tmp_path, apart)
    count = len(seen)
    streamed(tmp_path, [together])
    streamed(tmp_path, [dataclasses.replace(together, documents=torch.zeros_like(packed))])
    first, second, joined = seen[:count], seen[count : 2 * count], seen[2 * count :]
    assert torch.allclose(first[3], second[3], rtol=1e-3, atol=1e-3)  # inputs of `o`: after attention
    assert not torch.allclose(first[3], joined[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batches", [[], [batch(), Batch(*[torch.tensor([[1, SMALL.vocab_size]])] * 3)]], ids=len)
def test_tokens_that_cannot_be(tmp_path: Path, batches: Any) -> None:
    saved(tmp_path / "m")
    with pytest.raises(UsageError, match="no tokens"):
        quantize_folder(tmp_path / "m", tmp_path / "q", SCHEME, tensors=partial(calibrated, batches=batches))
    assert not (tmp_path / "q").exists()


def test_norms_are_as_they_were(tmp_path: Path) -> None:
    model = saved(tmp_path)
    got = streamed(tmp_path, [batch()])
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(got[name], parameter), to_hf(name)
