"""A bfloat16 folder loaded in 12 bits: the same model, and saved again the same folder."""

from pathlib import Path

import pytest
import torch

from cabochon.base.errors import UsageError
from cabochon.model.lossless import FEW_ROWS
from cabochon.weights.folder import load_model
from cabochon.weights.init import init_folder
from cabochon.weights.save import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lossless") / "m"
    init_folder("tiny", made, tokenizer=False)
    return made


def test_it_is_the_same_model(folder: Path) -> None:
    ids = torch.randint(4, 500, (1, FEW_ROWS + 6), generator=torch.Generator().manual_seed(0))
    plain, packed = load_model(folder, weights="bf16").eval(), load_model(folder, weights="lossless").eval()
    with torch.inference_mode():
        long, few = packed(ids), packed(ids[:, :7])
        assert torch.equal(long, plain(ids))  # unpacked for many rows: the same products
        torch.testing.assert_close(few, plain(ids[:, :7]), rtol=0.05, atol=0.05)  # few rows sum in another order


def test_saved_again_it_is_the_same_folder(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder, weights="lossless"), tmp_path / "again")
    ours, theirs = (load_model(f).state_dict() for f in (tmp_path / "again", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_what_is_bfloat16(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "wide", dtype=torch.float32)
    with pytest.raises(UsageError, match="lossless"):
        load_model(tmp_path / "wide", weights="lossless")
