"""A folder of things to deploy, written whole."""

import re
from collections.abc import Mapping
from pathlib import Path

from cabochon.base.errors import UsageError
from cabochon.base.files import atomic_folder

SCRIPT = "deploy.sh"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")  # goes into scripts and manifests as it is
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_HEAD = """\
#!/usr/bin/env bash
# Written by `cabochon deploy {platform}`: every step, to be read before it is run, or run one by one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# The image. SOURCE is the folder of cabochon's source, which has the Dockerfile; without it, the image has to be there.
if [ -n "${{SOURCE:-}}" ]; then
    docker build --target cuda --tag "{image}" "$SOURCE"
    docker push "{image}"
fi
"""


def check(fields: Mapping[str, object]) -> None:
    """Raise `UsageError` for a value that none of the platforms could use. `fields`: by the name of the flag."""
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, str) and not _PLAIN.fullmatch(value):
            raise UsageError(
                f"{flag} cannot be {value!r}", "letters, digits and . _ / : @ - are known", f"change {flag}"
            )
        if isinstance(value, int) and value < (name != "min_replicas"):
            raise UsageError(f"{flag} cannot be {value}", "it is too small", f"change {flag}")
    if not _NAME.fullmatch(str(fields["name"])):
        cause = "names have small letters, digits and dashes, 32 at most, and begin with a letter"
        raise UsageError(f"--name cannot be {fields['name']!r}", cause, "change --name")
    if int(str(fields["min_replicas"])) > int(str(fields["max_replicas"])):
        raise UsageError(
            "--min-replicas is above --max-replicas", "that leaves no number between", "change one of them"
        )


def check_bucket(value: str, flag: str) -> None:
    """Raise `UsageError` for what is no place in Google Cloud Storage."""
    if not re.fullmatch(r"gs://[a-z0-9._-]{3,}/\S+", value):
        raise UsageError(f"{flag} cannot be {value!r}", "it is not like gs://bucket/path", f"change {flag}")


def script(platform: str, image: str, steps: str) -> str:
    """The commands that deploy: those for the image, then the platform's."""
    return _HEAD.format(platform=platform, image=image) + "\n" + steps


def write(out: Path, files: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write texts by their name; scripts can be run.

    Raises as `atomic_folder`, and `UsageError` for a folder with anything else in it, also with `overwrite`: it would
    be gone.
    """
    other = next((file.name for file in out.iterdir() if file.name not in files), None) if out.is_dir() else None
    if other and overwrite:
        raise UsageError(f"{out} is not replaced", f"{other} in it would be lost", "name another folder")
    with atomic_folder(out, overwrite=overwrite) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
