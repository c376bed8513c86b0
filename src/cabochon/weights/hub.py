"""From what a user calls a model to a folder on this machine: the model inside, a folder, or a Hub id.

Downloads go through `huggingface_hub`: its cache is shared with other programs, finished files are kept when a
download is interrupted, and a connection that breaks is taken up again where it broke. Only safetensors, JSON and
the tokenizer are ever fetched, never code and never a pickled file.
"""

import errno
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError, nearest
from cabochon.weights.verify import verify

WELL_KNOWN = tuple(f"google/gemma-2-{size}" for size in ("2b", "2b-it", "2b-jpn-it", "9b", "9b-it", "27b", "27b-it"))
# What the Hub accepts as owner/name.
REPO_ID = re.compile(r"(?!.*(--|\.\.))(?=.{3,96}$)\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])(?<!\.git)", re.ASCII)
SMALL_FILES = ["*.json", "tokenizer.model"]
BUILT_IN = "(built in)"
BUILT_IN_ID = "cabochon/tiny"  # what the model inside is called where a name is needed, as by an adapter


@dataclass(frozen=True)
class LocalModel:
    """A model that can be used without a network. `revision` is a branch or tag when it has one, else a commit."""

    name: str
    nbytes: int
    revision: str | None
    path: Path


def resolve(
    name: str | Path | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a model, fetched from the Hugging Face Hub when it has to be.

    Args:
        name: None or "cabochon/tiny" is the model that ships inside; a folder is itself, also when its name looks like
            a Hub id; anything else is an id such as "google/gemma-2-2b-it".
        revision: branch, tag or commit on the Hub.
        token: access token; None uses the one that is stored on this machine, if any.
        offline: use only what is already on this machine.
        weights: False fetches the small files alone.

    Raises:
        UsageError: the name is neither a folder nor a possible id.
        MissingResource: no network, no access, no such model, no space; the cause says which.
        BadInput: the model has no safetensors weights.
    """
    if name is None:
        return built_in()
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own fails for an unknown ~user
    if str(name) and os.path.isdir(folder):  # noqa: PTH112 - Path's own fails for impossible names
        return folder
    if name == BUILT_IN_ID:
        return built_in()
    repo = _repo_id(name)
    folder = _fetch(repo, revision, token, offline, SMALL_FILES + ["*.safetensors"] * weights)
    if weights and not any(folder.glob("*.safetensors")):
        raise _without_weights(repo, offline)
    return folder


def adapter_folder(
    name: str | Path, revision: str | None = None, *, token: str | None = None, offline: bool = False
) -> Path:
    """The folder of an adapter, fetched from the Hub when it has to be. Raises as `resolve`."""
    if not os.path.isdir(os.path.expanduser(name)) and not REPO_ID.fullmatch(str(name)):  # noqa: PTH111, PTH112 - as above
        raise MissingResource(
            f"no adapter in {name}", "there is no such folder, and it is not a Hub id, which is owner/name", "check it"
        )
    return resolve(name, revision=revision, token=token, offline=offline)


def built_in() -> Path:
    """The folder of the model that ships inside the package. Raises `MissingResource` before it has been built."""
    folder = Path(str(files("cabochon").joinpath("models", "tiny")))
    if not (folder / "config.json").is_file():
        raise MissingResource(
            "the model that ships inside is not there",
            "this is a source tree in which it has not been built yet",
            "build it with `make tiny`, or name a model",
        )
    return folder


def list_models() -> list[LocalModel]:
    """The Gemma 2 models on this machine: the one inside, and those in the Hub's cache with their weights."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found = []
    try:
        folder = built_in()
        found.append(LocalModel(BUILT_IN, _size(folder), None, folder))
    except MissingResource:
        pass
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repo in sorted((r for r in repos if r.repo_type == "model"), key=lambda r: r.repo_id):
        for revision in sorted(repo.revisions, key=lambda r: -r.last_modified):
            if _is_usable(revision.snapshot_path):
                label = min(revision.refs, default=revision.commit_hash)
                found.append(LocalModel(repo.repo_id, revision.size_on_disk, label, revision.snapshot_path))
    return found


def _is_usable(folder: Path) -> bool:
    try:
        verify(folder)
    except CabochonError:
        return False
    return True


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _repo_id(name: str | Path) -> str:
    text = str(name)
    if os.path.isfile(text):  # noqa: PTH113 - as above
        raise UsageError(f"{text!r} is not a model", "it is a file", "name the folder that holds config.json")
    by_path = isinstance(name, Path) or text.startswith(("/", "~", "./", "../")) or text.count("/") > 1
    if by_path:
        raise MissingResource(f"no model in {text!r}", "there is no such folder", "check the path")
    if not REPO_ID.fullmatch(text):
        close = _suggestion(text)
        raise UsageError(
            f"no model named {text!r}",
            "there is no folder of that name, and it is not a Hub id, which is owner/name",
            f"did you mean {close!r}?" if close else f"name a folder, or an id such as {WELL_KNOWN[1]!r}",
        )
    return text


def _suggestion(text: str) -> str | None:
    """The well-known id that was probably meant; the owner is often left out."""
    short = text.rpartition("/")[2].lower()
    close = nearest(short, [name.partition("/")[2] for name in WELL_KNOWN])
    return f"google/{close}" if close and f"google/{close}" != text else None


def _fetch(repo: str, revision: str | None, token: str | None, offline: bool, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            local_files_only=offline,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],  # other formats of the same weights lie in subfolders
        )
    except Exception as error:  # the client lets through what its HTTP, storage and file layers raise
        raise _explain(error, repo, revision, offline) from None
    return Path(folder)


def _explain(error: BaseException, repo: str, revision: str | None, offline: bool) -> MissingResource:
    """What the client's exception means for the user. Chains are followed: it often wraps the real cause."""
    from huggingface_hub import errors, get_token

    causes = _chain(error)
    what = f"{repo} was not fetched"
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    log_in = "log in with `hf auth login`" if get_token() is None else "check the token that is stored here"
    response = next((e.response for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
    status = response.status_code if response is not None else None
    if _any(causes, errors.GatedRepoError) or status == 403:
        return MissingResource(
            what,
            "its owners ask everybody to accept a licence first, and this account has not",
            f"accept it on {site}/{repo}, then {log_in} or pass --token",
        )
    if _any(causes, errors.RevisionNotFoundError):
        return MissingResource(
            what, f"it has no revision {revision!r}", f"see {site}/{repo}/commits/main for its history"
        )
    if _any(causes, errors.RepositoryNotFoundError) or status == 401:
        close = _suggestion(repo)
        return MissingResource(
            what,
            "the Hub has no such model, or it is private and this account may not see it",
            f"did you mean {close!r}?" if close else f"check the name; for a private model, {log_in} or pass --token",
        )
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in causes) or any(
        "no space left" in str(e).lower() for e in causes
    ):
        return MissingResource(what, "the disk is full", "free some space, or set HF_HOME to a folder on another disk")
    if offline or _any(causes, errors.OfflineModeIsEnabled):
        return MissingResource(
            what,
            "it is not on this machine, or not all of it, and the network is not to be used",
            "leave out --offline (and HF_HUB_OFFLINE) once",
        )
    if status is not None:
        return MissingResource(what, f"{site} answered with error {status}", "try again later")
    return _unreachable(what, site, causes)


def _unreachable(what: str, site: str, causes: list[BaseException]) -> MissingResource:
    reason = next((str(e).splitlines()[0] for e in reversed(causes) if str(e)), type(causes[0]).__name__)
    return MissingResource(
        what,
        f"{site} cannot be reached: {reason}",
        "check the network, then type the same again: what is already here is kept",
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return chain


def _any(causes: list[BaseException], kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in causes)


def _without_weights(repo: str, offline: bool) -> CabochonError:
    if offline:
        return MissingResource(
            f"the weights of {repo} are not on this machine",
            "only its small files have been fetched",
            f"fetch them with `cabochon pull {repo}`, without --offline",
        )
    return BadInput(
        f"{repo} cannot be used",
        "it has no safetensors weights; pickled files can run code and are not fetched",
        "choose a repository with model.safetensors, or convert the weights with the program that wrote them",
    )
