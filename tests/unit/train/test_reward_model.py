"""Reward models: the loss against plain autograd, folders that transformers loads, calibration, use as a reward."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cabochon.base.errors import BadInput, CabochonError, UsageError
from cabochon.cli.main import main
from cabochon.data.format import record_examples
from cabochon.data.pack import Packer, Waiting, as_batch, shifted
from cabochon.data.records import Record
from cabochon.model.config import Gemma2Config
from cabochon.model.scored import ScoredGemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.preference import pair_count
from cabochon.train.reward_build import open_rewards
from cabochon.train.reward_config import RewardConfig
from cabochon.train.reward_model import BINS, ModelScorer, answer_ids, calibrated, reward_measure, reward_objective
from cabochon.train.reward_model_config import RewardModelConfig
from cabochon.train.scoring import Failure, Sample
from cabochon.weights.folder import load_model
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder
from cabochon.weights.save import save_model
from support import small_model

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=96, attn_softcap=3.0,
)  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"What is {n} + {n}?"}],
     "chosen": [{"role": "model", "content": f"It is {2 * n}."}],
     "rejected": [{"role": "model", "content": "No idea, " * (n % 3 + 1)}]}
    for n in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(built_in())


def scored(seed: int = 0) -> ScoredGemma2:
    model = ScoredGemma2.over(small_model(CONFIG, seed, size=0.2))
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


def batch_of(tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> Any:
    records = (Record("", 0, row, "row") for row in rows)
    pairs = (record_examples(tokenizer, record, "preference", fold=False) for record in records)
    waiting = iter([Waiting([shifted(one) for one in pair], split=False) for pair in pairs])
    packer, packed = Packer(lambda: next(waiting, None), 96, lookahead=1), []
    while row := packer.next_row():
        packed.append(row)
    return as_batch(packed)


def sample(row: dict[str, Any], key: str) -> Sample:
    return Sample("", row[key][0]["content"], row)


def test_the_loss_and_its_gradient_against_plain_autograd(tokenizer: Tokenizer) -> None:
    model, batch = scored().double(), batch_of(tokenizer, ROWS)
    assert pair_count(batch) == 5 and len(batch.ids) > 1
    found = reward_objective(RewardModelConfig(centring=0.1))(model, batch, 5)
    ours = torch.autograd.grad(found.loss, list(model.parameters()), allow_unused=True)
    losses, right = [], 0
    for row in ROWS:  # each answer alone, without packing
        both = []
        for key in ("chosen", "rejected"):
            ids = torch.tensor([answer_ids(tokenizer, sample(row, key))])
            both.append((model.hidden(ids)[0, -1] * model.score.weight[0]).sum())
        losses.append(-torch.log(torch.sigmoid(both[0] - both[1])) + 0.1 * (both[0] + both[1]) ** 2)
        right += bool(both[0] > both[1])
    plain = torch.stack(losses).mean()
    torch.testing.assert_close(found.loss, plain, rtol=1e-6, atol=1e-6)
    assert found.measures["accuracy"] == right / 5
    theirs = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_folder_that_transformers_loads_and_scores_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = scored()
    save_model(model, tmp_path / "reward", tokenizer_files=tokenizer.files())
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert type(theirs).__name__ == "Gemma2ForSequenceClassification" and theirs.config.num_labels == 1
    scorer = ModelScorer(tmp_path / "reward")
    for row in ROWS:
        ids = torch.tensor([answer_ids(tokenizer, sample(row, "chosen"))])
        (ours,) = scorer([sample(row, "chosen")])
        with torch.no_grad():
            assert float(theirs(ids).logits[0, 0]) == pytest.approx(ours, rel=1e-4, abs=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    for name, content in tokenizer.files().items():
        (tmp_path / "back" / name).write_bytes(content)
    (again,), (ours,) = ModelScorer(tmp_path / "back")([sample(ROWS[1], "chosen")]), scorer([sample(ROWS[1], "chosen")])
    assert again == pytest.approx(ours, rel=1e-6)  # where a tensor begins in its file decides about last bits


def test_a_reward_model_is_no_language_model_and_the_other_way_round(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(scored(), tmp_path / "reward", tokenizer_files=tokenizer.files())
    save_model(small_model(CONFIG), tmp_path / "model", tokenizer_files=tokenizer.files())
    with pytest.raises(BadInput, match=r"is a reward model(.|\n)*--reward model:"):
        load_model(tmp_path / "reward")
    with pytest.raises(BadInput, match=r"not a reward model(.|\n)*train reward"):
        ModelScorer(tmp_path / "model")
    with pytest.raises(UsageError, match="no folder"):
        open_rewards(RewardConfig(reward=("model:",)), tmp_path, "cpu")
    with pytest.raises(CabochonError, match="no such folder"):
        open_rewards(RewardConfig(reward=("model:nowhere",)), tmp_path, "cpu")


def test_calibration_written_out(tokenizer: Tokenizer) -> None:
    model, batch = scored(), batch_of(tokenizer, ROWS)
    with torch.no_grad():
        count, sums = reward_measure(model, batch)
        found = calibrated({name: value / count for name, value in sums.items()})
        scores = [
            [float(model.scores(model.hidden(torch.tensor([answer_ids(tokenizer, sample(row, key))]))[0, -1:]))
             for key in ("chosen", "rejected")]
            for row in ROWS
        ]  # fmt: skip
    bins: dict[int, list[tuple[float, bool]]] = {}
    for chosen, rejected in scores:
        sure = 1 / (1 + math.exp(-abs(chosen - rejected)))
        bins.setdefault(min(BINS - 1, int((sure - 0.5) * 2 * BINS)), []).append((sure, chosen > rejected))
    error = sum(abs(sum(s for s, _ in one) / len(one) - sum(r for _, r in one) / len(one)) * len(one) / 5
                for one in bins.values())  # fmt: skip
    assert found["ece"] == pytest.approx(error, abs=1e-5) and found["ece"] > 0.01
    assert found["accuracy"] == sum(c > r for c, r in scores) / 5
    assert set(found) == {"loss", "accuracy", "margin", "ece"}


def test_scores_do_not_depend_on_others_and_have_reasons_to_be_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(scored(), tmp_path / "reward", tokenizer_files=tokenizer.files())
    scorer = ModelScorer(tmp_path / "reward")
    samples = [sample(row, "chosen") for row in ROWS]
    assert scorer(samples) == [scorer([one])[0] for one in samples]
    empty, long = scorer([Sample("", " ", ROWS[0]), Sample("", "word " * 200, ROWS[0])])
    assert isinstance(empty, float) and isinstance(long, Failure) and "reads 96" in long.reason
    text = {"prompt": "What is 3 + 3?"}  # a prompt that is text is asked in a chat as well
    as_chat = {"prompt": [{"role": "user", "content": "What is 3 + 3?"}]}
    assert scorer([Sample("", "6", text)]) == scorer([Sample("", "6", as_chat)])


def test_the_command_learns_and_its_result_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    init_folder(CONFIG, tmp_path / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {n}?"}],
         "chosen": [{"role": "model", "content": f"Yes, {n}."}],
         "rejected": [{"role": "model", "content": f"No, {n}!"}]}
        for n in range(60)
    ]  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        "train reward start --data pairs.jsonl --steps 30 --rows 4 --length 64 --learning-rate 3e-3 --warmup-steps 2"
        " --held-out 0.2 --precision float32 --save-every 10 --out run"
    ).split()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "accuracy" in err and "ece" in err
    last = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()][-1]
    assert last["eval_accuracy"] == 1 and 0 <= last["eval_ece"] < 0.5 and not any("gap" in name for name in last)
    assert json.loads(Path("run/config.json").read_text())["architectures"] == ["Gemma2ForSequenceClassification"]
    assert load_file("run/model.safetensors")["score.weight"].shape == (1, 32)
    rewards = open_rewards(RewardConfig(reward=("model:run",)), tmp_path, "cpu")
    good, bad = rewards([sample(rows[0], "chosen"), sample(rows[0], "rejected")])
    assert good.total is not None and bad.total is not None and good.total > bad.total
    assert main(command) == 0 and "is done" in capsys.readouterr().err
    assert main(["run", "run", "hello"]) == 3 and "is a reward model" in capsys.readouterr().err
    # What a checkpoint holds is gone on from.
    for name in ("config.json", "model.safetensors"):
        Path("run", name).unlink()
    assert main(command) == 0 and "is done" not in capsys.readouterr().err
    assert main([*command[:-1], "other", "--label-smoothing", "0.1"]) == 2
    assert main([*command[:-1], "other", "--centring", "-1"]) == 2
