"""Hugging Face Inference Endpoints: a container of ours, or their own server with our handler.

Either way the platform mounts the model at /repository, and nothing is downloaded.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from cabochon.base.version import package_version
from cabochon.deploy.folder import SCRIPT, check, script

MOUNT, PORT = "/repository", 8080
_HANDLER = '''"""Found by Inference Endpoints beside the model, where no container is named."""

from cabochon.deploy.handler import EndpointHandler

__all__ = ["EndpointHandler"]
'''
_STEPS = """\
# The model, as `cabochon` saves and quantises it, with the handler for endpoints that run without the image.
if [ -n "${{MODEL:-}}" ]; then
    hf upload "{repository}" "$MODEL" .
fi
hf upload "{repository}" "$here/handler.py" handler.py
hf upload "{repository}" "$here/requirements.txt" requirements.txt

# The endpoint. HF_TOKEN is a token that may write; NAMESPACE is the user or organisation that pays.
curl --fail --silent --show-error "https://api.endpoints.huggingface.cloud/v2/endpoint/$NAMESPACE" \\
    --header "Authorization: Bearer $HF_TOKEN" --header "Content-Type: application/json" --data "@$here/endpoint.json"
"""


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """An endpoint.

    Args:
        repository: The model on the Hub, which the platform mounts.
        image: The container's address in a registry.
        name: The endpoint's.
        vendor: Whose machines: aws, azure or gcp.
        region: Where.
        instance_type: Kind of machine, as the platform calls it.
        instance_size: How much of it.
        min_replicas: 0: none while nobody asks.
        max_replicas: At most so many.
        package: What pip installs for the handler: a requirement, or the address of a wheel.
    """

    repository: str
    image: str
    name: str = "cabochon"
    vendor: str = "aws"
    region: str = "us-east-1"
    instance_type: str = "nvidia-l4"
    instance_size: str = "x1"
    min_replicas: int = 0
    max_replicas: int = 1
    package: str = f"cabochon=={package_version()}"

    def __post_init__(self) -> None:
        check({name: value for name, value in asdict(self).items() if name != "package"})


def endpoint(config: HfConfig) -> dict[str, Any]:
    """What the API of Inference Endpoints makes an endpoint from."""
    scaling = {"minReplica": config.min_replicas, "maxReplica": config.max_replicas, "scaleToZeroTimeout": 15}
    return {
        "name": config.name,
        "type": "authenticated",
        "provider": {"vendor": config.vendor, "region": config.region},
        "compute": {
            "accelerator": "cpu" if "nvidia" not in config.instance_type else "gpu",
            "instanceType": config.instance_type,
            "instanceSize": config.instance_size,
            "scaling": scaling,
        },
        "model": {
            "repository": config.repository,
            "revision": None,
            "framework": "custom",
            "task": "text-generation",
            "image": {"custom": {"url": config.image, "port": PORT, "healthRoute": "/ready"}},
            "env": {
                "CABOCHON_MODEL": MOUNT,
                "CABOCHON_FLAGS": f"--model-name {config.repository}",
                "HF_HUB_OFFLINE": "1",
                "PORT": str(PORT),
            },
        },
    }


def files(config: HfConfig) -> dict[str, str]:
    """What `cabochon deploy hf` writes."""
    return {
        "handler.py": _HANDLER,
        "requirements.txt": f"{config.package}\n",
        "endpoint.json": json.dumps(endpoint(config), indent=2) + "\n",
        SCRIPT: script("hf", config.image, _STEPS.format(repository=config.repository)),
    }
