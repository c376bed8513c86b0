"""What a container of ours runs: `python -m cabochon.deploy.container [FLAGS OF cabochon serve]`.

It turns the variables that a platform sets into a `cabochon serve`, and becomes that process, so that signals reach it.

| variable | |
|---|---|
| AIP_STORAGE_URI | Vertex AI: gs://bucket/path of the model, fetched before the server starts |
| AIP_HTTP_PORT, AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE | Vertex AI: where it asks |
| CABOCHON_MODEL | a folder or a Hugging Face id, where there is no AIP_STORAGE_URI; neither: the model inside |
| PORT | where there is no AIP_HTTP_PORT; 8080 without either |
| CABOCHON_FLAGS | further flags, as a shell would read them |
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cabochon.base.errors import CabochonError, UsageError
from cabochon.deploy.storage import Storage

_ROUTES = {"AIP_HEALTH_ROUTE": "--health-route", "AIP_PREDICT_ROUTE": "--predict-route"}


def command(environment: Mapping[str, str], flags: Sequence[str] = ()) -> list[str]:
    """The command that an environment asks for. Fetches the model where that has to be fetched.

    Raises `UsageError` for CABOCHON_FLAGS that no shell could read, and what `Storage.download` raises.
    """
    model = environment.get("CABOCHON_MODEL")
    if uri := environment.get("AIP_STORAGE_URI"):
        place = Path(environment.get("TMPDIR", tempfile.gettempdir()), "cabochon", "model")
        model = str(Storage(environment).download(uri, place)) if uri.startswith("gs://") else uri
    port = environment.get("AIP_HTTP_PORT") or environment.get("PORT") or "8080"
    try:
        more = shlex.split(environment.get("CABOCHON_FLAGS", ""))
    except ValueError as error:
        raise UsageError("CABOCHON_FLAGS cannot be read", str(error), "close what is quoted in it") from None
    routes = [text for name, flag in _ROUTES.items() if environment.get(name) for text in (flag, environment[name])]
    words = [sys.executable, "-m", "cabochon", "serve", *([model] if model else [])]
    return [*words, "--host", "0.0.0.0", "--port", port, *routes, *more, *flags]


def main() -> None:
    """Become the server, or say why not and end."""
    try:
        words = command(os.environ, sys.argv[1:])
    except CabochonError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
