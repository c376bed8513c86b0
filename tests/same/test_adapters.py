"""An adapter becomes part of a model the same way wherever that happens: loading, merging, and after training."""

import pytest
import torch

from cabochon.merge.parse import read_config
from cabochon.merge.run import Merge
from cabochon.model.lora import LoraConfig, adapter_parameters, attach, merge
from cabochon.weights.adapters import save_adapter
from cabochon.weights.folder import load_model
from cabochon.weights.save import save_model
from support import small_model

KINDS = {
    "LoRA": LoraConfig(rank=3, alpha=5),
    "rsLoRA": LoraConfig(rank=5, alpha=2, rslora=True, targets=("q_proj", "up_proj")),
    "DoRA": LoraConfig(rank=4, dora=True),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_whoever_merges(config, dtype, tmp_path):
    model = small_model().to(dtype)
    save_model(model, tmp_path / "base")
    attach(model, config)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(model, tmp_path / "adapter", base_model_name=str(tmp_path / "base"))
    merge(model)
    loaded = load_model(tmp_path / "base", adapter=tmp_path / "adapter").state_dict()
    written = f"models: [{{model: {tmp_path}/base+{tmp_path}/adapter}}]\nmerge_method: passthrough\n"
    (tmp_path / "merge.yml").write_text(written)
    Merge.prepare(read_config(tmp_path / "merge.yml")).write(tmp_path / "merged")
    merged = load_model(tmp_path / "merged").state_dict()
    for name, values in model.state_dict().items():
        assert loaded[name].dtype == merged[name].dtype == values.dtype == dtype
        assert torch.equal(loaded[name], merged[name]), name
        # one rounding of bfloat16, or float32 sums of rows in other pieces
        torch.testing.assert_close(loaded[name], values, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
