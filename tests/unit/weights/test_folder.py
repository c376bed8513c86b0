"""Sound folders load exactly; every unsound one is refused with what is wrong, before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import change_json, change_tensors, saved
from safetensors.torch import load_file, save_file

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.weights.folder import describe, load_config, load_model
from cabochon.weights.header import read_header
from cabochon.weights.mapped import PIECE, MappedFile
from support import SMALL

EMBEDDING = "model.embed_tokens.weight"
SHARDS = 60_000  # bytes; a small model takes four files


def error(folder: Path, kind: type[CabochonError] = BadInput) -> CabochonError:
    with pytest.raises(kind) as caught:
        load_model(folder)
    assert str(caught.value).count("\n") == 2
    return caught.value


# What is sound


@pytest.mark.parametrize("shard_bytes", [1 << 30, SHARDS, 1])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float64])
def test_every_value_arrives(tmp_path: Path, shard_bytes: int, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    model = saved(tmp_path, shard_bytes=shard_bytes, dtype=stored)
    loaded = load_model(tmp_path, dtype=wanted)
    assert loaded.config == model.config == load_config(tmp_path)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == (wanted or stored)
        assert torch.equal(ours, theirs.to(stored).to(wanted or stored)), name
        assert ours.requires_grad


def test_conversion_works_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.weights.mapped.PIECE", 7)
    monkeypatch.setattr("cabochon.weights.save.PIECE", 11)
    model = saved(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        for ours, theirs in zip(load_model(tmp_path, dtype=dtype).parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs.to(dtype))


def test_weights_can_be_trained_in_place_and_the_files_stay(tmp_path: Path) -> None:
    model = saved(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_model(tmp_path)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    assert not torch.equal(loaded.embedding.weight, model.embedding.weight)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)


def test_the_folder_can_go_while_its_model_is_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = saved(folder)
    loaded = load_model(folder)
    saved(folder, overwrite=True, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_unaligned_files_of_others_load(tmp_path: Path) -> None:
    model = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)


def test_a_copied_head_and_old_constants_are_left_aside(tmp_path: Path) -> None:
    model = saved(tmp_path, shard_bytes=SHARDS)
    head = {
        "lm_head.weight": model.embedding.weight.detach(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    save_file(head, tmp_path / "head.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"] | dict.fromkeys(head, "head.safetensors")
    change_json(index, weight_map=placed)
    loaded = load_model(tmp_path)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_without_soft_cap_on_request(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_model(tmp_path).config.attn_softcap == SMALL.attn_softcap
    model = load_model(tmp_path, softcap=False)
    assert (model.config.attn_softcap, model.config.final_softcap) == (None, SMALL.final_softcap)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of them."""
    model = saved(tmp_path / "blobs", shard_bytes=SHARDS)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert torch.equal(load_model(tmp_path / "snapshot").embedding.weight, model.embedding.weight)


def test_facts(tmp_path: Path) -> None:
    saved(tmp_path, shard_bytes=SHARDS, dtype=torch.bfloat16, tokenizer_files={"tokenizer.json": b"{}"})
    facts = describe(tmp_path)
    assert (facts.dtype, facts.tokenizer, facts.config) == ("bfloat16", "tokenizer.json", SMALL)
    assert facts.nbytes == 2 * facts.parameters == 2 * SMALL.num_parameters
    assert [shard.name for shard in facts.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in facts.shards:
        shard.unlink()
    (tmp_path / "tokenizer.json").unlink()
    small = describe(tmp_path)  # the index is one of the small files
    assert (small.config, small.dtype, small.tokenizer, small.nbytes) == (SMALL, None, None, 0)


# What is not


def single(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        saved(folder)
        change(folder / "model.safetensors")

    return apply


def several(change: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    """A change to a folder of several files; it may edit the index in place."""

    def apply(folder: Path) -> None:
        saved(folder, shard_bytes=SHARDS)
        index = folder / "model.safetensors.index.json"
        placed = json.loads(index.read_text())["weight_map"]
        change(folder, placed)
        if index.exists():
            change_json(index, weight_map=placed)

    return apply


def twice(folder: Path, placed: dict[str, str]) -> None:
    last = folder / max(placed.values())
    save_file({**load_file(last), EMBEDDING: load_file(folder / placed[EMBEDDING])[EMBEDDING]}, last)


def with_value(name: str, value: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensor = load_file(file)[name].clone()
        tensor.view(-1)[-1] = value
        change_tensors(file, **{name: tensor})

    return change


ROWS = torch.zeros(SMALL.vocab_size, SMALL.hidden_size)
WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing tensor": (single(lambda f: change_tensors(f, **{EMBEDDING: None})), "lack", EMBEDDING),
    "unknown tensor": (
        single(lambda f: change_tensors(f, model__extra=ROWS)),
        "does not have",
        "model.extra",
    ),
    "tensor of a layer too many": (
        single(lambda f: change_tensors(f, model__layers__3__mlp__up_proj__weight=ROWS)),
        "does not have",
        "model.layers.3.mlp.up_proj.weight",
    ),
    "wrong shape": (
        single(lambda f: change_tensors(f, model__norm__weight=torch.zeros(41))),
        "shapes",
        "model.norm.weight [41] for [40]",
    ),
    "JAX vocabulary": (
        single(lambda f: change_tensors(f, **{EMBEDDING: torch.zeros(SMALL.vocab_size + 128, 40)})),
        "shapes",
        EMBEDDING,
    ),
    "many missing": (single(lambda f: save_file({EMBEDDING: ROWS}, f)), "config.json describes", "1 tensors"),
    "half missing": (
        single(lambda f: save_file({n: t for n, t in load_file(f).items() if ".mlp." not in n}, f)),
        "lack",
        "model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, "
        "model.layers.0.mlp.down_proj.weight and 6 more",
    ),
    "integers": (
        single(lambda f: change_tensors(f, model__norm__weight=torch.zeros(40, dtype=torch.int8))),
        "BF16, F16 or F32",
        "model.norm.weight (I8)",
    ),
    "not a number": (
        single(with_value("model.norm.weight", float("nan"))),
        "cannot be used",
        "model.norm.weight",
    ),
    "infinite": (single(with_value(EMBEDDING, float("-inf"))), "cannot be used", EMBEDDING),
    "untied head": (
        single(lambda f: change_tensors(f, lm_head__weight=ROWS)),
        "not a Gemma 2",
        "lm_head.weight",
    ),
    "head of another shape": (
        single(lambda f: change_tensors(f, lm_head__weight=ROWS[1:])),
        "shapes",
        "lm_head.weight [210, 40] for [211, 40]",
    ),
    "truncated": (single(lambda f: f.write_bytes(f.read_bytes()[:-1])), "cannot be used", "the file has"),
    "bytes behind the end": (
        single(lambda f: f.write_bytes(f.read_bytes() + b"x")),
        "cannot be used",
        "the file has",
    ),
    "pickles": (
        single(lambda f: f.rename(f.with_name("pytorch_model.bin"))),
        "cannot be used",
        "nothing is ever unpickled",
    ),
    "index outside": (
        several(lambda _, p: p.update({EMBEDDING: "../secret.safetensors"})),
        "cannot be used",
        "../secret.safetensors",
    ),
    "index absolute": (
        several(lambda _, p: p.update({EMBEDDING: "/etc/x.safetensors"})),
        "cannot be used",
        "/etc/x.safetensors",
    ),
    "index hidden or device": (several(lambda _, p: p.update({EMBEDDING: ".."})), "cannot be used", "'..'"),
    "index not a name": (several(lambda _, p: p.update({EMBEDDING: 5})), "cannot be used", "5"),  # type: ignore[dict-item]
    "index empty": (several(lambda _, p: p.clear()), "cannot be used", "weight_map"),
    "index forgets one": (
        several(lambda _, p: [p.pop("model.norm.weight"), None][1]),
        "disagree",
        "model.norm.weight in",
    ),
    "index misplaces one": (
        several(lambda _, p: p.update({"model.norm.weight": min(p.values())})),
        "disagree",
        "model.norm.weight not in",
    ),
    "tensor in two files": (several(twice), "hold tensors twice", EMBEDDING),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unsound_folder_is_refused(tmp_path: Path, case: str) -> None:
    change, what, cause = WRONG[case]
    change(tmp_path / "m")
    raised = error(tmp_path / "m")
    assert what in raised.what
    assert cause in raised.cause


@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_found(tmp_path: Path, at: int, dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(2 * PIECE + 1)
    tensor[at] = value
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    source = MappedFile(tmp_path / "x.safetensors").tensor(read_header(tmp_path / "x.safetensors")["x"], torch.float32)
    assert not source.load(dtype, torch.device("cpu"))[1]


def test_a_value_that_only_the_wanted_dtype_cannot_hold(tmp_path: Path) -> None:
    single(with_value("model.norm.weight", 3.4e38))(tmp_path)
    load_model(tmp_path)
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        load_model(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00004.safetensors", "model.safetensors.index.json"])
def test_a_missing_file_is_a_missing_resource(tmp_path: Path, name: str) -> None:
    saved(tmp_path, shard_bytes=SHARDS)
    (tmp_path / name).unlink()
    raised = error(tmp_path, MissingResource)
    assert name in str(raised)


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in error(tmp_path / "m", MissingResource).cause


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "sound JSON"),
        (b"\xff\xfe", "sound JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"model_type": "gemma2", "model_type": "llama"}', "twice"),
        (b'{"model_type": "llama"}', "only the Gemma 2"),
        (b'{"x": ' + b"[" * 10_000, "sound JSON"),
        (b" " * (1 << 20) + b"{}", "larger"),
    ],
)
def test_an_unreadable_configuration(tmp_path: Path, text: bytes, cause: str) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    assert cause in error(tmp_path).cause


@pytest.mark.parametrize("layers", [10**4, 10**15])
def test_an_absurd_configuration_is_refused_at_once(tmp_path: Path, layers: int) -> None:
    saved(tmp_path)
    change_json(tmp_path / "config.json", num_hidden_layers=layers, layer_types=None)
    assert f"{layers} layers" in error(tmp_path).cause


def test_absurd_sizes_never_reach_torch(tmp_path: Path) -> None:
    saved(tmp_path)
    change_json(tmp_path / "config.json", hidden_size=2**70)
    assert "shapes" in error(tmp_path).what


def test_float16_is_refused_and_bfloat16_named(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UsageError) as asked:
        load_model(tmp_path, dtype=torch.float16)
    half = {name: t.half() for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    stored = error(tmp_path)
    for raised in (asked.value, stored):
        assert "float16" in raised.what
        assert "bfloat16" in raised.hint
    assert load_model(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "mps:7"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    saved(tmp_path)
    with pytest.raises(MissingResource) as caught:
        load_model(tmp_path, device=device)
    assert device in caught.value.what


@pytest.mark.parametrize("problem", [lambda: torch.empty(2**55), lambda: bytearray(2**60)])
def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Callable[[], object]) -> None:
    saved(tmp_path)
    monkeypatch.setattr("cabochon.weights.mapped.MappedTensor.load", lambda *_: problem())
    assert "was not loaded" in error(tmp_path, MissingResource).what


def test_a_bug_of_ours_stays_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr("cabochon.weights.mapped.MappedTensor.load", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        load_model(tmp_path)
