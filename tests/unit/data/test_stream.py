"""Streams of batches: the same on any number of ranks and threads, and from any step on."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_checks import Pairs, Ranks, documents, expected, segments

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.config import DataConfig
from cabochon.data.pack import IGNORED
from cabochon.data.stream import merge_states, open_eval, open_stream
from cabochon.text.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "golden" / "text")
BOS, EOS, START, END = (
    TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.start_of_turn_id, TOKENIZER.end_of_turn_id
)  # fmt: skip

WORDS = st.lists(st.sampled_from("the red house sings 12 tree é <eos> <end_of_turn>".split()), min_size=1, max_size=30)
TEXTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=25)
CHATS = st.lists(
    st.lists(WORDS.map(" ".join), min_size=2, max_size=5), min_size=1, max_size=25
)  # contents of turns, the user first


def text_rows(texts: list[str]) -> list[Any]:
    return [{"text": text} for text in texts]


def chat_rows(chats: list[list[str]]) -> list[Any]:
    return [{"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": content}
                          for i, content in enumerate(chat)]} for chat in chats]  # fmt: skip


def write(folder: str, rows: list[Any]) -> str:
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_pairs(text: str) -> Pairs:
    ids = [BOS, *TOKENIZER.encode(text, bos=False), EOS]
    return expected(ids, [True] * len(ids))


def chat_pairs(contents: list[str]) -> Pairs:
    """Token by token: what stands between "model" and the end of a turn is learned, that end included."""
    ids, learned = [BOS], [False]
    for number, content in enumerate(contents):
        role = "model" if number % 2 else "user"
        said = TOKENIZER.encode(f"{role}\n{content}", bos=False)
        head = TOKENIZER.encode(f"{role}\n", bos=False)
        assert said[: len(head)] == head
        ids += [START, *said, END, *TOKENIZER.encode("\n", bos=False)]
        mine = number % 2 == 1
        learned += [False] * (1 + len(head)) + [mine] * (len(said) - len(head) + 1) + [False]
    return expected(ids, learned)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 9), st.integers(2, 40), st.integers(1, 3), st.booleans())
def test_running_text_comes_whole_once_in_each_epoch(
    texts: list[str], rows: int, length: int, epochs: int, shuffle: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(sources=(write(folder, text_rows(texts)),), epochs=epochs, shuffle=shuffle)
        with Ranks(config, TOKENIZER, rows=rows, length=length) as ranks:
            batches = ranks.batches()
            (stream,) = ranks.streams
        found = documents(batches, BOS)
        wanted = [text_pairs(text) for text in texts]
        assert Counter(map(tuple, found)) == Counter({k: epochs * n for k, n in Counter(map(tuple, wanted)).items()})
        assert stream.documents == epochs * len(texts)
        assert stream.real_tokens == epochs * sum(map(len, wanted))
        assert stream.real_tokens + stream.padded_tokens == len(batches) * rows * length
        assert stream.count() == len(batches)
        if rows == 1 and not shuffle:
            assert found == wanted * epochs


@settings(max_examples=40, deadline=None)
@given(CHATS, st.integers(1, 9), st.integers(8, 120), st.integers(1, 2), st.booleans())
def test_chats_come_whole_or_cut_once_in_each_epoch(
    chats: list[list[str]], rows: int, length: int, epochs: int, packing: bool
) -> None:
    wanted = [pairs[:length] for pairs in map(chat_pairs, chats)]
    usable = [pairs for pairs in wanted if any(target != IGNORED for _, target in pairs)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, chat_rows(chats))
        config = DataConfig(sources=(path,), epochs=epochs, packing=packing, max_bad_rows=len(chats))
        if not usable:
            with pytest.raises(BadInput, match="no row of the data can be used"):
                open_stream(config, TOKENIZER, rows=rows, length=length)
            return
        with Ranks(config, TOKENIZER, rows=rows, length=length) as ranks:
            batches = ranks.batches()
            (stream,) = ranks.streams
        found = [pairs for batch in batches for row in batch for pairs in segments(row)]
        assert Counter(map(tuple, found)) == Counter(
            {pairs: epochs * n for pairs, n in Counter(map(tuple, usable)).items()}
        )
        assert stream.bad_rows == len(chats) - len(usable)
        assert stream.truncated == epochs * sum(len(chat_pairs(chat)) > len(chat_pairs(chat)[:length])
                                                for chat, pairs in zip(chats, wanted, strict=True)
                                                if pairs in usable)  # fmt: skip
        assert stream.count() == len(batches)
        if not packing:
            assert all(len(list(segments(row))) <= 1 for batch in batches for row in batch)


@settings(max_examples=15, deadline=None)
@given(TEXTS, CHATS, st.sampled_from([4, 8]), st.integers(30, 90), st.integers(0, 9), st.sampled_from([1, 2, None]),
       st.data())  # fmt: skip
def test_ranks_threads_and_restarts_change_nothing(
    texts: list[str], chats: list[list[str]], rows: int, length: int, seed: int, epochs: int | None, data: st.DataObject
) -> None:
    weights = data.draw(st.sampled_from([(), (0.3, 0.7)] if epochs is None else [()]))
    with tempfile.TemporaryDirectory() as folder:
        for name, written in (("text", text_rows(texts)), ("chat", chat_rows([["the tree", "red"], *chats]))):
            (Path(folder) / name).mkdir()
            write(f"{folder}/{name}", written)
        fields: dict[str, Any] = {
            "sources": (f"{folder}/text", f"{folder}/chat"), "weights": weights, "epochs": epochs, "seed": seed,
            "max_bad_rows": 100,
        }  # fmt: skip
        some = None if epochs else 12
        with Ranks(DataConfig(**fields), TOKENIZER, rows=rows, length=length) as ranks:
            plain = ranks.batches(some)
        assert plain
        stop = data.draw(st.integers(0, len(plain)))
        for world, workers, prefetch, then in ((1, 2, 3, 2), (2, 1, 0, 4), (4, 3, 2, 1)):
            config = DataConfig(**fields, workers=workers, prefetch=prefetch)
            with Ranks(config, TOKENIZER, rows=rows, length=length, world=world) as ranks:
                first = ranks.batches(stop)
                state = ranks.state()
            with Ranks(config, TOKENIZER, rows=rows, length=length, world=then) as ranks:
                ranks.restore(state)
                assert ranks.state() == state
                rest = ranks.batches(None if epochs else len(plain) - stop)
            assert same(first + rest, plain)


def test_every_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    path = write(str(tmp_path), text_rows([str(n) for n in range(40)]))
    with Ranks(DataConfig(sources=(path,), epochs=2), TOKENIZER, rows=1, length=64) as ranks:
        found = documents(ranks.batches(), BOS)
    with Ranks(DataConfig(sources=(path,), epochs=1, seed=1), TOKENIZER, rows=1, length=64) as ranks:
        other = documents(ranks.batches(), BOS)
    wanted = [text_pairs(str(n)) for n in range(40)]
    orders = [found[:40], found[40:], other, wanted]
    assert all(sorted(order) == sorted(wanted) for order in orders)
    assert len({str(order) for order in orders}) == 4


def test_fewer_documents_than_rows_reach_every_row(tmp_path: Path) -> None:
    path = write(str(tmp_path), text_rows(["one", "two", "three"]))
    with Ranks(DataConfig(sources=(path,)), TOKENIZER, rows=8, length=16) as ranks:
        (batch,) = ranks.batches(1)
    assert all(any(True for _ in segments(row)) for row in batch)


def test_shares_of_a_mixture_are_shares_of_tokens(tmp_path: Path) -> None:
    short, long = (text_rows([word * n + str(i) for i in range(200)]) for word, n in (("house ", 2), ("tree ", 40)))
    for name, rows in (("short", short), ("long", long)):
        (tmp_path / name).mkdir()
        write(str(tmp_path / name), rows)
    config = DataConfig(sources=(str(tmp_path / "short"), str(tmp_path / "long")), weights=(1, 3))
    with Ranks(config, TOKENIZER, rows=4, length=64) as ranks:
        batches = ranks.batches(100)
        whole = documents(batches, BOS)
    only_long = set(TOKENIZER.encode("tree ", bos=False)) - set(TOKENIZER.encode("house 0123456789", bos=False))
    is_long = [any(i in only_long for i, _ in d) for d in whole]
    share = sum(len(d) for d, long in zip(whole, is_long, strict=True) if long) / sum(map(len, whole))
    assert share == pytest.approx(0.75, abs=0.02)
    first = [any(i in only_long for i, _ in next(segments(row))) for row in batches[0]]
    assert set(first) == {True, False}  # not every row begins with the same source


def test_chats_fill_their_rows(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randn(3000, generator=draw).exp() * 12).int().clamp(1, 200).tolist()
    path = write(str(tmp_path), chat_rows([["tree", "the red " * n] for n in lengths]))
    with open_stream(DataConfig(sources=(path,), epochs=1), TOKENIZER, rows=8, length=256) as stream:
        for _ in stream:
            pass
        packed = stream.real_tokens / (stream.real_tokens + stream.padded_tokens)
    with open_stream(DataConfig(sources=(path,), epochs=1, packing=False), TOKENIZER, rows=8, length=256) as stream:
        for _ in stream:
            pass
        padded = stream.real_tokens / (stream.real_tokens + stream.padded_tokens)
    assert packed > 0.95 and padded < 0.3  # the last batches of an epoch are not full


def test_control_pieces_that_someone_typed_stay_text(tmp_path: Path) -> None:
    typed = "<end_of_turn><bos><start_of_turn>model"
    path = write(str(tmp_path), chat_rows([[typed, typed]]))
    with open_stream(DataConfig(sources=(path,), epochs=1), TOKENIZER, rows=1, length=200) as stream:
        (batch,) = stream
    ids = batch.ids[0].tolist()
    assert (ids.count(BOS), ids.count(START), ids.count(END)) == (1, 2, 2)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    texts = [f"the tree {n}" for n in range(50)]
    config = DataConfig(sources=(write(str(tmp_path), text_rows(texts)),), epochs=1, held_out=0.1)
    with Ranks(config, TOKENIZER, rows=2, length=16) as ranks:
        trained = documents(ranks.batches(), BOS)
    evaluation = open_eval(config, TOKENIZER, rows=2, length=16)
    assert evaluation is not None
    with evaluation:
        batches = [torch.stack([b.ids, b.targets, b.documents], dim=1) for b in evaluation]
    with evaluation.again() as again:
        assert all(torch.equal(b.ids, batch[:, 0]) for b, batch in zip(again, batches, strict=True))
    held = documents(batches, BOS)
    assert len(held) == 5 and len(trained) == 45
    assert sorted(held + trained) == sorted(text_pairs(text) for text in texts)


def test_evaluation_from_elsewhere_is_in_order_and_unweighted(tmp_path: Path) -> None:
    names = []
    for name in "abc":
        (tmp_path / name).mkdir()
        names.append(write(str(tmp_path / name), text_rows([f"{name} {n}" for n in range(3)])))
    config = DataConfig(sources=tuple(names[:2]), weights=(0.5, 0.5), eval_sources=tuple(names[1:]))
    evaluation = open_eval(config, TOKENIZER, rows=1, length=8)
    assert evaluation is not None
    with evaluation:
        batches = [torch.stack([b.ids, b.targets, b.documents], dim=1) for b in evaluation]
    assert documents(batches, BOS) == [text_pairs(f"{name} {n}") for name in "bc" for n in range(3)]
    assert open_eval(DataConfig(sources=tuple(names)), TOKENIZER, rows=1, length=8) is None


def test_pairs_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": "the tree ", "chosen": "sings " * n, "rejected": "red"} for n in range(1, 9)]
    config = DataConfig(sources=(write(str(tmp_path), rows),), epochs=1)
    with Ranks(config, TOKENIZER, rows=2, length=80) as ranks:
        found = [list(segments(row)) for batch in ranks.batches() for row in batch]
    pairs = [tuple(map(tuple, row[i : i + 2])) for row in found for i in range(0, len(row), 2)]
    prompt = TOKENIZER.encode("the tree ")

    def answer(text: str) -> tuple[tuple[int, int], ...]:
        following = [*TOKENIZER.encode(text, bos=False), EOS]
        return tuple(expected(prompt + following, [False] * len(prompt) + [True] * len(following)))

    assert sorted(pairs) == sorted((answer("sings " * n), answer("red")) for n in range(1, 9))


def test_states_of_different_steps_are_not_merged(tmp_path: Path) -> None:
    config = DataConfig(sources=(write(str(tmp_path), text_rows(["a tree"])),))
    with Ranks(config, TOKENIZER, rows=2, length=8, world=2) as ranks:
        next(ranks.streams[0])
        with pytest.raises(ValueError, match="different steps"):
            merge_states([stream.state() for stream in ranks.streams])


def test_a_run_goes_on_only_in_the_data_it_had(tmp_path: Path) -> None:
    rows = text_rows(["the tree", "red", "house"])
    config = DataConfig(sources=(write(str(tmp_path), rows),))
    with Ranks(config, TOKENIZER, rows=2, length=8, world=2) as ranks:
        ranks.batches(1)
        state, alone = ranks.state(), ranks.streams[0].state()
    with open_stream(config, TOKENIZER, rows=2, length=8) as stream, pytest.raises(BadInput, match="lacks rows 1"):
        stream.restore(alone)
    for changed, name in (
        (DataConfig(sources=config.sources, seed=1), "seed was 0 when it was saved, and is 1"),
        (DataConfig(sources=config.sources, packing=False), "packing"),
    ):
        with open_stream(changed, TOKENIZER, rows=2, length=8) as stream, pytest.raises(UsageError, match=name):
            stream.restore(state)
    write(str(tmp_path), [*rows, *rows])
    with open_stream(config, TOKENIZER, rows=2, length=8) as stream, pytest.raises(UsageError, match="documents"):
        stream.restore(state)


def test_rows_are_shared_evenly_or_not_at_all(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="6 rows cannot be shared by 4"):
        open_stream(DataConfig(sources=("x",)), tokenizer, rows=6, length=8, world=4)
