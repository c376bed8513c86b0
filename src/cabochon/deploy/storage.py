"""A folder out of Google Cloud Storage, by its JSON API: what Vertex AI names in AIP_STORAGE_URI.

Where to ask, and who for a token, are the variables that Google's own libraries read: STORAGE_EMULATOR_HOST and
GCE_METADATA_HOST.
"""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.base.files import atomic_folder

T = TypeVar("T")
_METADATA = "metadata.google.internal"
_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"
_TRIES, _TIMEOUT, _AT_A_TIME, _BLOCK = 5, 60.0, 8, 2**22


@dataclass(frozen=True)
class Stored:
    """One object: its whole name, its size in bytes, its MD5 in base64 ("" for objects made of parts)."""

    name: str
    size: int
    md5: str


@dataclass(frozen=True)
class Storage:
    """The service, as an environment says where it is.

    Attributes:
        wait: seconds before the second try; each further one waits twice as long.
    """

    environment: Mapping[str, str]
    wait: float = 1.0

    def download(self, uri: str, folder: Path) -> Path:
        """Everything below gs://bucket/path, as a folder that is there as a whole or not at all.

        Raises `BadInput` for an address or an object that cannot be, `MissingResource` when the service fails or
        the disk does.
        """
        bucket, prefix = parsed(uri)
        found = list(self.listed(bucket, prefix))
        if not found:
            raise MissingResource(f"there is no model at {uri}", "no object begins with that path", "check the path")
        targets = [inside(stored.name[len(prefix) :]) for stored in found]
        with _kept(folder), atomic_folder(folder, overwrite=True) as new, ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(lambda one, target: self._fetch(bucket, one, new / target), found, targets))
        return folder

    def listed(self, bucket: str, prefix: str) -> Iterator[Stored]:
        """The objects below a path, page by page."""
        asked = {"prefix": prefix, "fields": "items(name,size,md5Hash),nextPageToken"}
        while True:
            page = json.loads(self._try(f"/b/{quote(bucket, safe='')}/o?{urlencode(asked)}", HTTPResponse.read))
            for item in page.get("items", ()):
                if not item["name"].endswith("/"):  # what consoles make for an empty folder
                    yield Stored(item["name"], int(item["size"]), item.get("md5Hash", ""))
            if not page.get("nextPageToken"):
                return
            asked["pageToken"] = page["nextPageToken"]

    def _fetch(self, bucket: str, stored: Stored, target: Path) -> None:
        def write(response: HTTPResponse) -> None:
            hashed, size = hashlib.md5(usedforsecurity=False), 0
            with _kept(target), target.open("wb") as file:
                while block := _next(response):
                    file.write(block)
                    hashed.update(block)
                    size += len(block)
            whole = stored.md5 in ("", base64.b64encode(hashed.digest()).decode())
            if size != stored.size or not whole:
                raise HTTPException(f"{stored.name} came as {size} other bytes")

        target.parent.mkdir(parents=True, exist_ok=True)
        self._try(f"/b/{quote(bucket, safe='')}/o/{quote(stored.name, safe='')}?alt=media", write)

    def _try(self, path: str, read: Callable[[HTTPResponse], T]) -> T:
        host = self.environment.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
        address = f"{host if '://' in host else f'http://{host}'}/storage/v1{path}"
        for number in range(_TRIES):
            try:
                with urlopen(Request(address, headers=self._authorization()), timeout=_TIMEOUT) as response:
                    return read(response)
            except (OSError, HTTPException) as error:
                final = isinstance(error, HTTPError) and error.code not in (401, 408, 429) and error.code < 500
                if final or number == _TRIES - 1:
                    raise _failed(address, error) from None
                time.sleep(self.wait * 2**number)
        raise AssertionError

    def _authorization(self) -> dict[str, str]:
        """A new token for each request: a download may take longer than one is valid, and asking is a local call."""
        host = self.environment.get("GCE_METADATA_HOST")
        if host is None and "STORAGE_EMULATOR_HOST" in self.environment:
            return {}
        asked = Request(f"http://{host or _METADATA}{_TOKEN}", headers={"Metadata-Flavor": "Google"})
        with urlopen(asked, timeout=_TIMEOUT) as response:
            return {"Authorization": f"Bearer {json.load(response)['access_token']}"}


def parsed(uri: str) -> tuple[str, str]:
    """Bucket and path, which ends with a slash unless it is empty. Raises `BadInput`."""
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme != "gs" or not bucket:
        raise BadInput(f"{uri} is no place of a model", "it is not like gs://bucket/path", "check the address")
    return bucket, f"{path.strip('/')}/" if path.strip("/") else ""


def inside(name: str) -> str:
    """The name of an object as a path below a folder. Raises `BadInput` for one that leads out of it."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or "\0" in name:
        raise BadInput(f"the object {name!r} cannot be a file", "its name leads out of the folder", "rename it")
    return name


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """What this machine's disk refuses, which asking again does not help."""
    try:
        yield
    except OSError as error:
        hint = "free some space, or name a folder on another disk (TMPDIR)"
        raise MissingResource(f"{path} was not written", error.strerror or str(error), hint) from None


def _next(response: HTTPResponse) -> bytes:
    """More of a body. Raises `HTTPException` where the network fails, which is no matter of the disk."""
    try:
        return response.read(_BLOCK)
    except OSError as error:
        raise HTTPException(str(error)) from None


def _failed(address: str, error: Exception) -> CabochonError:
    told = f"{error.code} {error.reason}" if isinstance(error, HTTPError) else str(error) or type(error).__name__
    hint = "check that the service account may read the bucket (roles/storage.objectViewer)"
    return MissingResource(f"{address.partition('?')[0]} cannot be read", told, hint)
