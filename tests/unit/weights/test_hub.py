"""Names to folders: through a Hub on this machine that also fails, and without any network."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, model_files, serve
from folders import saved

from cabochon.base.errors import CabochonError, MissingResource, UsageError
from cabochon.weights import hub as hub_module
from cabochon.weights.folder import load_model
from cabochon.weights.hub import REPO_ID, WELL_KNOWN, built_in, resolve

SOURCE = Path(hub_module.__file__).parents[2]
# The client reads its settings when it is imported, so every call gets a process of its own.
CALL = """
import json, sys
from cabochon.base.errors import CabochonError
from cabochon.weights.hub import list_models, resolve
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        if arguments == "list":
            answers.append([(m.name, m.nbytes, m.revision, str(m.path)) for m in list_models()])
        else:
            answers.append(str(resolve(arguments.pop("name"), **arguments)))
    except CabochonError as error:
        answers.append([type(error).__name__, *str(error).splitlines()])
print(json.dumps(answers))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    saved(
        tmp_path / "source",
        shard_bytes=60_000,
        tokenizer_files={"tokenizer.json": b"{}", "tokenizer.model": b"m"},
    )
    with serve(FakeHub(model_files(tmp_path / "source"))) as running:
        yield running


def calls(cache: Path, url: str, *arguments: Any, **env: str) -> list[Any]:
    foreign = ("HF_", "HUGGING", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.upper().startswith(foreign)},
        "PYTHONPATH": str(SOURCE),
        "HF_HOME": str(cache),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def model(**options: Any) -> dict[str, Any]:
    return {"name": "owner/model", **options}


def refused(answer: list[str], kind: str, *words: str) -> None:
    assert answer[0] == kind, answer
    assert len(answer) == 4
    for word in words:
        assert word in " ".join(answer), (word, answer)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# A Hub


def test_a_model_is_fetched_once_and_stays(tmp_path: Path, hub: FakeHub) -> None:
    cache = tmp_path / "cache"
    small, whole = calls(cache, hub.url, model(weights=False), model(token="hf_secret"))
    assert small == whole
    expected = {name for name in hub.files if not name.endswith((".bin", ".py")) and "/" not in name}
    assert {file.name for file in Path(whole).iterdir()} == set(hub.fetched()) == expected
    assert hub.tokens == {None, "Bearer hf_secret"}
    assert load_model(Path(whole)).config.num_layers == 3
    hub.requests.clear()
    again, pinned, listed = calls(cache, hub.url, model(offline=True), model(offline=True, revision=COMMIT), "list")
    assert again == pinned == whole
    assert hub.requests == []
    assert [m for m in listed if m[0] == "owner/model"] == [
        ["owner/model", sum(len(hub.files[n]) for n in expected), "main", whole]
    ]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path: Path, hub: FakeHub) -> None:
    name, step = "model-large.safetensors", 10 * 2**20  # the client writes in steps of this size
    hub.files[name] = os.urandom(2 * step + 99)
    hub.cut_after[name] = 2 * step + 1
    (folder,) = calls(tmp_path / "cache", hub.url, model())
    assert (Path(folder) / name).read_bytes() == hub.files[name]
    ranges = [asked for verb, path, asked in hub.requests if verb == "GET" and path.endswith(name)]
    assert ranges == [None, f"bytes={2 * step}-"]


def test_an_interrupted_download_goes_on_with_the_files_that_are_missing(tmp_path: Path, hub: FakeHub) -> None:
    broken = min(n for n in hub.files if n.startswith("model-"))
    hub.cut_after[broken], hub.cut_always = 0, True
    (failed,) = calls(tmp_path / "cache", hub.url, model())
    refused(failed, "MissingResource", "owner/model", "type the same again")
    (offline,) = calls(tmp_path / "cache", hub.url, model(offline=True))
    refused(offline, "MissingResource", "not all of it", "--offline")
    hub.cut_after.clear()
    hub.requests.clear()
    (folder,) = calls(tmp_path / "cache", hub.url, model())
    assert load_model(Path(folder)).config.num_layers == 3
    assert broken in hub.fetched()


def test_small_files_alone_are_not_a_model(tmp_path: Path, hub: FakeHub) -> None:
    _, offline, listed = calls(tmp_path / "cache", hub.url, model(weights=False), model(offline=True), "list")
    refused(offline, "MissingResource", "not all of it")
    assert not [m for m in listed if m[0] == "owner/model"]


def test_a_repository_of_pickles(tmp_path: Path, hub: FakeHub) -> None:
    hub.files = {name: data for name, data in hub.files.items() if "safetensors" not in name}
    (answer,) = calls(tmp_path / "cache", hub.url, model())
    refused(answer, "BadInput", "no safetensors weights")
    assert "pytorch_model.bin" not in hub.fetched()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ((403, "GatedRepo"), ["accept a licence", "/owner/model", "hf auth login", "--token"]),
        ((401, "GatedRepo"), ["accept a licence", "--token"]),
        ((403, ""), ["accept a licence", "--token"]),
        ((401, ""), ["no such model, or it is private", "--token"]),
        ((404, "RepoNotFound"), ["no such model, or it is private"]),
        ((400, ""), ["answered with error 400"]),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, hub: FakeHub, error: tuple[int, str], words: list[str]) -> None:
    hub.error = error
    (answer,) = calls(tmp_path / "cache", hub.url, model())
    refused(answer, "MissingResource", *words)


def test_names_and_revisions_that_are_not_there(tmp_path: Path, hub: FakeHub) -> None:
    other, near, revision = calls(
        tmp_path / "cache",
        hub.url,
        {"name": "owner/none"},
        {"name": "gogle/gemma-2-2b-it"},
        model(revision="v9"),
    )
    refused(other, "MissingResource", "no such model")
    refused(near, "MissingResource", "did you mean 'google/gemma-2-2b-it'?")
    refused(revision, "MissingResource", "no revision 'v9'")


# No Hub


def test_no_network(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (answer,) = calls(tmp_path / "cache", url, model())
    refused(answer, "MissingResource", "cannot be reached", "check the network")
    offline, listed = calls(tmp_path / "cache", url, model(offline=True), "list")
    refused(offline, "MissingResource", "not on this machine", "--offline")
    assert [m[0] for m in listed if m[0] != "(built in)"] == []
    (by_environment,) = calls(tmp_path / "cache", url, model(), HF_HUB_OFFLINE="1")
    refused(by_environment, "MissingResource", "HF_HUB_OFFLINE")


def test_a_cached_model_needs_no_network(tmp_path: Path, hub: FakeHub) -> None:
    (folder,) = calls(tmp_path / "cache", hub.url, model())
    (again,) = calls(tmp_path / "cache", f"http://127.0.0.1:{free_port()}", model())
    assert again == folder


# Names


def test_a_folder_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "google" / "gemma-2-2b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("google/gemma-2-2b", Path("google/gemma-2-2b"), folder, "~/google/gemma-2-2b"):
        assert resolve(name).samefile(folder)


@pytest.mark.parametrize("name", ["/no/such", "./m", "../m", "a/b/c", "~/m", Path("owner/model"), "~nobody-here/m"])
def test_a_path_that_is_not_there(name: str | Path) -> None:
    with pytest.raises(MissingResource, match="no such folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["", " ", "a b/c", "-a/b", "a/b.git", "a/b--c", "x\0y", "a" * 200 + "/b", "é/b", "a/"])
def test_an_impossible_name(name: str) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match="it is a file"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gemma-2-9b", "google/gemma-2-9b"),
        ("gemma-2-2b-i", "google/gemma-2-2b-it"),
        ("Gemma-2-27B", "google/gemma-2-27b"),
    ],
)
def test_a_name_without_its_owner_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(name)
    assert f"did you mean {meant!r}?" in caught.value.hint


def test_ids_are_those_that_the_client_accepts() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in (
        *WELL_KNOWN,
        "a/b",
        "a_b/c.d-e",
        "a./b",
        ".a/b",
        "a/b-",
        "a/b..c",
        "a/b.git",
        "a" * 90 + "/b",
        "a--b/c",
    ):
        try:
            validate_repo_id(name)
            accepted = True
        except HFValidationError:
            accepted = False
        assert bool(REPO_ID.fullmatch(name)) <= accepted, name
    assert all(REPO_ID.fullmatch(name) for name in WELL_KNOWN)


def test_the_model_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "files", lambda _: tmp_path)
    with pytest.raises(MissingResource, match="make tiny"):
        resolve(None)
    saved(tmp_path / "models" / "tiny")
    assert resolve(None) == built_in() == tmp_path / "models" / "tiny"


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("the client says something else") from error

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(CabochonError, match="the disk is full"):
        resolve("owner/model")
