"""Where tasks find their data: the Hub, or copies of it in a folder."""

import os
import socket
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource

WAIT = 3.0  # seconds for the Hub to take a connection


def offline_if_out_of_reach(*, offline: bool = False) -> None:
    """Let the libraries know when there is no network: they would try again and again for half a minute each time."""
    from urllib.parse import urlsplit

    import datasets
    import huggingface_hub

    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    proxies = [name for name in os.environ if name.lower() in ("https_proxy", "http_proxy", "all_proxy")]
    if not offline and not proxies:
        try:
            socket.create_connection((endpoint.hostname, endpoint.port or 443), WAIT).close()
        except OSError:
            offline = True
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


class Datasets:
    """While it is entered, data sets that a folder has copies of are read from there.

    The copy of `cais/mmlu` is FOLDER/cais/mmlu, as `hf download --repo-type dataset cais/mmlu --local-dir` makes it.

    Attributes:
        failed: the data set that could not be loaded, if one could not.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.expanduser() if folder else None
        self.failed: str | None = None

    def __enter__(self) -> "Datasets":
        import datasets

        self._module, self._load = datasets, datasets.load_dataset
        datasets.load_dataset = self._redirected
        return self

    def __exit__(self, *_: object) -> None:
        self._module.load_dataset = self._load

    def _redirected(self, path: str, *arguments: Any, **named: Any) -> Any:
        copy = self._folder / path if self._folder else None
        try:
            found = self._load(str(copy) if copy and copy.exists() else path, *arguments, **named)
        except Exception:
            self.failed = path
            raise
        return found

    def explain(self, task: str, error: Exception) -> CabochonError:
        """The error of the data set that failed, in words."""
        assert self.failed
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if self.failed in ("json", "csv", "parquet", "text"):
            return BadInput(f"the data of {task} cannot be read", lines[0], "check the files that its task file names")
        return MissingResource(
            f"the data of {task} is not here: {self.failed}",
            f"the Hub cannot be asked, and there is no copy ({lines[0]})",
            f"where there is a network: hf download --repo-type dataset {self.failed} --local-dir DATA/{self.failed}; "
            "then add --data DATA",
        )
