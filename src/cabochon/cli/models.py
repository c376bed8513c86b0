"""`cabochon list`: what can be used without a network."""

import json as json_format
from dataclasses import asdict

from cabochon.cli.options import Json


def list_models(*, json: Json = False) -> None:
    """List the models on this machine.

    Example: cabochon list
    """
    from cabochon.weights import hub

    models = [asdict(model) for model in hub.list_models()]
    if json:
        print(json_format.dumps(models, default=str))
        return
    for model in models:
        size = f"{model['nbytes'] / 1e9:.2f} GB"
        print("  ".join(str(value) for value in (model["name"], size, model["revision"], model["path"]) if value))
