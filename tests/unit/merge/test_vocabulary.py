"""Vocabularies and embeddings against what mergekit makes of them (tests/golden/merge/vocabulary)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from cabochon.base.errors import BadInput
from cabochon.merge.config import ModelRef, TokenChoice, TokenizerChoice
from cabochon.merge.embeddings import embeddings
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge
from cabochon.merge.vocabulary import align, read_tokenizers
from cabochon.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "merge" / "vocabulary"


def _load():
    with safe_open(GOLDEN / "mergekit.safetensors", "pt") as file:
        documents = {k: json.loads(v) for k, v in file.metadata().items() if v[0] in "[{"}
        return documents, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


DOCUMENTS, TENSORS = _load()
CONFIGS, OUTCOMES, ROWS = (DOCUMENTS[key] for key in ("configs", "outcomes", "rows"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of the golden models' tokenizers and the rows of their embeddings, by model."""
    top = tmp_path_factory.mktemp("models")
    for name in ROWS:
        (top / name).mkdir()
        for file, document in json.loads((GOLDEN / f"{name}.json").read_text()).items():
            (top / name / file).write_text(json.dumps(document))
    return {ModelRef(name): (top / name, rows) for name, rows in ROWS.items()}


def chosen(config):
    """A configuration of the golden file in our form."""
    tokens = {}
    for text, told in config.get("tokens", {}).items():
        source, force = told["source"], told.get("force", False)
        if isinstance(source, str):
            tokens[text] = TokenChoice(ModelRef(source), force=force)
        else:
            model = ModelRef(source["model"]) if source["kind"] == "model_token" else None
            tokens[text] = TokenChoice(model, source.get("token"), source.get("token_id"), force)
    origin = config["source"]
    return TokenizerChoice(ModelRef(origin) if origin in ROWS else origin, tokens, config.get("pad_to_multiple_of"))


def aligned(config, folders):
    refs = [ModelRef(name) for name in config["models"]]
    base = ModelRef(config["base"]) if config["base"] else None
    read = read_tokenizers({ref: folders[ref] for ref in refs}, base)
    vocabulary = align(read, chosen(config), base)
    inputs = {ref: TENSORS[f"inputs/{ref}"] for ref in refs}
    return vocabulary, inputs, base


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["id"])
def test_the_tokenizer_is_mergekits(config, folders, tmp_path):
    vocabulary, _, _ = aligned(config, folders)
    outcome = OUTCOMES[config["id"]]
    assert vocabulary.tokens == outcome["tokens"]
    library = Tokenizer.from_buffer(vocabulary.files["tokenizer.json"])
    assert library.get_vocab(with_added_tokens=True) == vocabulary.tokens
    assert [library.encode(text, add_special_tokens=False).ids for text in DOCUMENTS["texts"]] == outcome["texts"]
    for name, content in vocabulary.files.items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).vocab_size == vocabulary.used


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["id"])
def test_the_embeddings_are_mergekits(config, folders):
    vocabulary, inputs, _ = aligned(config, folders)
    made = embeddings(vocabulary, inputs)
    for ref in inputs:
        expected = TENSORS[f"{config['id']}/{ref}"]
        assert made.shape == expected.shape
        whole = made.rows(ref, 0, vocabulary.size)
        torch.testing.assert_close(whole[vocabulary.used :], expected[vocabulary.used :], rtol=1e-6, atol=1e-7)
        assert torch.equal(whole[: vocabulary.used], expected[: vocabulary.used])
        for step in (1, 3, 7):
            pieces = [made.rows(ref, i, min(i + step, vocabulary.size)) for i in range(0, vocabulary.size, step)]
            assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["id"])
def test_permutations_lead_to_the_same_token(config, folders):
    vocabulary, inputs, base = aligned(config, folders)
    read = read_tokenizers({ref: folders[ref] for ref in inputs}, base)
    for ref, rows in vocabulary.permutations.items():
        assert rows.dtype == torch.int64
        assert rows.shape == (vocabulary.size,)
        pieces = {i: token for token, i in read[ref].ids.items()}
        for token, row in vocabulary.tokens.items():
            assert rows[row] == -1 or pieces[int(rows[row])] == token


@pytest.mark.parametrize("name", ["linear", "ties", "warp_slerp", "nuslerp", "model_stock"])
def test_methods_merge_aligned_embeddings_as_they_merge_whole_ones(name, folders):
    config = next(c for c in CONFIGS if c["id"] == "tokens")
    vocabulary, inputs, base = aligned(config, folders)
    made, method = embeddings(vocabulary, inputs, base), METHODS[name]
    models = [ref for ref in inputs if ref != base]
    base = None if method.base == "none" else base
    weights = {"weight": 0.5} if any(p.name == "weight" for p in method.parameters) else {}
    settings = bind(method, {}, [weights] * len(models))
    out, expected = torch.empty(made.shape), torch.empty(made.shape)
    merge(method, made.whole(models, base, block=3 * made.shape[1]), settings, out)
    full = {ref: made.rows(ref, 0, vocabulary.size) for ref in inputs}
    plain = Whole(tuple(full[ref] for ref in models), None if base is None else full[base])
    merge(method, plain, settings, expected)
    assert torch.equal(out, expected)


def test_equal_tokenizers_are_read_once_and_change_nothing(folders, tmp_path):
    folder, rows = folders[ModelRef("a")]
    names = [ModelRef(str(i)) for i in range(3)]
    read = read_tokenizers(dict.fromkeys(names, (folder, rows)))
    assert len({id(tokenizer.ids) for tokenizer in read.values()}) == 1
    for source in ("base", "union", names[2]):
        vocabulary = align(read, TokenizerChoice(source))
        assert vocabulary.unchanged
        assert vocabulary.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
        assert not vocabulary.notes
    assert not align(read, TokenizerChoice("base", pad_to_multiple_of=32)).unchanged
    assert not align(read, TokenizerChoice("base", {"ab": TokenChoice(names[1], force=True)})).unchanged


def test_rows_behind_the_tokens_are_left_out(folders):
    read = read_tokenizers({ModelRef("b"): folders[ModelRef("b")]})
    vocabulary = align(read, TokenizerChoice("base"))
    assert not vocabulary.unchanged
    assert vocabulary.size == ROWS["b"] - 2


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(folders, tmp_path):
    a, bare = ModelRef("a"), ModelRef("bare")
    read = read_tokenizers({bare: (tmp_path, 18), a: folders[a]}, a)
    vocabulary = align(read, TokenizerChoice("union"), a)
    assert torch.equal(vocabulary.permutations[bare], vocabulary.permutations[a])
    assert vocabulary.notes == ("bare has no tokenizer and is taken to have that of a",)


def test_a_merged_token_without_an_embedding_is_left_out_with_its_merge(folders):
    d = ModelRef("d")
    folder, rows = folders[d]
    vocabulary = align(read_tokenizers({d: (folder, rows - 1)}), TokenizerChoice("base"))
    library = Tokenizer.from_buffer(vocabulary.files["tokenizer.json"])
    assert vocabulary.size == rows - 1
    assert library.encode("abe", add_special_tokens=False).tokens == ["ab", "e"]


def test_the_older_table_of_added_tokens_follows(folders, tmp_path):
    a, b = ModelRef("a"), ModelRef("b")
    for file in folders[a][0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}, "bos_token": "<bos>"}))
    (tmp_path / "tokenizer.model").write_bytes(b"old")
    vocabulary = align(read_tokenizers({a: (tmp_path, ROWS["a"]), b: folders[b]}), TokenizerChoice("union"))
    config = json.loads(vocabulary.files["tokenizer_config.json"])
    assert config["bos_token"] == "<bos>"
    told = {entry["content"]: int(i) for i, entry in config["added_tokens_decoder"].items()}
    assert told["<tool>"] == vocabulary.tokens["<tool>"]
    assert "tokenizer.model" not in vocabulary.files


def test_different_settings_and_rows_without_a_source_are_told(folders):
    config = next(c for c in CONFIGS if c["id"] == "union")
    vocabulary, _, _ = aligned(config, folders)
    assert vocabulary.notes == ("'<tool>' is added with different settings by different models; the first counts",)
    read = read_tokenizers({ModelRef(name): folders[ModelRef(name)] for name in "ab"})
    vocabulary = align(read, TokenizerChoice("base", {"<new>": False}))
    assert vocabulary.notes == ("1 rows of the output's embedding have no source in any model: they are zeros",)
    vocabulary = align(read, TokenizerChoice("base", {"<new>": TokenChoice(None)}))
    made = embeddings(vocabulary, {ref: TENSORS[f"inputs/{ref}"] for ref in read})
    assert not made.rows(ModelRef("a"), vocabulary.used - 1, vocabulary.used).any()


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (TokenizerChoice(ModelRef("x")), "no tokenizer of x"),
        (TokenizerChoice("base", {"a": TokenChoice(ModelRef("x"))}), "no tokenizer of x"),
        (TokenizerChoice("base", {"a": True}), "force and no source"),
        (TokenizerChoice("base", {"[X]": TokenChoice(ModelRef("a"))}), "it does not have the token"),
        (TokenizerChoice("base", {"<n>": TokenChoice(ModelRef("a"), "gone")}), "it does not have the token"),
        (TokenizerChoice("base", {"<n>": TokenChoice(ModelRef("a"), token_id=99)}), "it does not have the token"),
        (TokenizerChoice("base", {"<n>": TokenChoice(ModelRef("c"), token_id=1)}), "takes no part"),
    ],
    ids=str,
)
def test_sources_that_cannot_be_used_are_refused(choice, told, folders):
    read = read_tokenizers({ModelRef(name): folders[ModelRef(name)] for name in "abc"})
    with pytest.raises(BadInput, match="error") as refused:
        embeddings(align(read, choice), {ModelRef(name): TENSORS[f"inputs/{name}"] for name in "ab"})
    assert told in str(refused.value)


def test_embeddings_that_do_not_fit_are_refused(folders):
    refs = [ModelRef("a"), ModelRef("b")]
    vocabulary = align(read_tokenizers({ref: folders[ref] for ref in refs}), TokenizerChoice("base"))
    with pytest.raises(BadInput, match="widths"):
        embeddings(vocabulary, {refs[0]: torch.zeros(16, 4), refs[1]: torch.zeros(23, 5)})
    with pytest.raises(BadInput, match="does not fit"):
        embeddings(vocabulary, {refs[0]: torch.zeros(15, 4), refs[1]: torch.zeros(23, 4)})


def test_only_json_can_be_extended(folders, tmp_path):
    golden = GOLDEN.parents[1] / "text" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(golden.read_bytes())
    pieces = ModelRef("pieces")
    read = read_tokenizers({pieces: (tmp_path, 10_000), ModelRef("a"): folders[ModelRef("a")]})
    assert align(read, TokenizerChoice("base")).files.keys() == {"tokenizer.model"}
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        align(read, TokenizerChoice("union"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_refused(name, folders, tmp_path):
    a, b = ModelRef("a"), ModelRef("b")
    for file in folders[a][0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text("{")
    with pytest.raises(BadInput, match=name):
        align(read_tokenizers({a: (tmp_path, ROWS["a"]), b: folders[b]}), TokenizerChoice("union"))
