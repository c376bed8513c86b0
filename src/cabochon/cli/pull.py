"""`cabochon pull`: fetch a model so that later commands need no network."""

import json as json_format
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from cabochon.cli.options import HubOptions, Json


def pull(
    repo: Annotated[str, Parameter(help="owner/name on the Hugging Face Hub.")],
    /,
    *,
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> None:
    """Fetch a model from the Hugging Face Hub and print where it lies.

    A download that was interrupted goes on where it stopped.

    Example: cabochon pull google/gemma-2-2b-it
    """
    from cabochon.weights.hub import resolve

    folder = resolve(repo, **asdict(hub))
    print(json_format.dumps({"repo": repo, "folder": str(folder)}) if json else folder)
