"""Vertex AI: the commands that make a model and an endpoint, which runs a container of ours."""

import json
from dataclasses import asdict, dataclass

from cabochon.deploy.folder import SCRIPT, check, check_bucket, script

PORT = 8080
_STEPS = """\
# The model's folder, as `cabochon` saves and quantises it, where the container fetches it from.
if [ -n "${{MODEL:-}}" ]; then
    gcloud storage rsync --recursive "$MODEL" "{storage}"
fi

gcloud ai models upload --project="{project}" --region="{region}" --display-name="{name}" \\
    --container-image-uri="{image}" --artifact-uri="{storage}" --container-ports={port} \\
    --container-health-route=/ready --container-predict-route=/predict \\
    --container-env-vars=CABOCHON_FLAGS="--model-name={name}"
gcloud ai endpoints create --project="{project}" --region="{region}" --display-name="{name}"

# The newest of each is the one that was just made.
newest() {{
    gcloud ai "$1" list --project="{project}" --region="{region}" --filter=display_name="{name}" \\
        --sort-by=~createTime --limit=1 --format="value(name)"
}}
gcloud ai endpoints deploy-model "$(newest endpoints)" --project="{project}" --region="{region}" \\
    --model="$(newest models)" --display-name="{name}" --machine-type="{machine}" \\
    --accelerator=type={accelerator},count=1 --min-replica-count={least} --max-replica-count={most} \\
    --traffic-split=0=100

gcloud ai endpoints predict "$(newest endpoints)" --project="{project}" --region="{region}" \\
    --json-request="$here/request.json"
"""
_REQUEST = {
    "instances": [
        {"@requestFormat": "chatCompletions", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64},
        {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    ]
}


@dataclass(frozen=True, kw_only=True)
class VertexConfig:
    """A model on an endpoint.

    Args:
        project: Google Cloud's.
        storage: gs://bucket/path of the model's folder, from where each container fetches it.
        image: The container's address in a registry.
        region: Where.
        name: Of the model and the endpoint.
        machine: Kind of machine.
        accelerator: Its GPU.
        min_replicas: At least so many.
        max_replicas: At most so many.
    """

    project: str
    storage: str
    image: str
    region: str = "us-central1"
    name: str = "cabochon"
    machine: str = "g2-standard-8"
    accelerator: str = "nvidia-l4"
    min_replicas: int = 1
    max_replicas: int = 2

    def __post_init__(self) -> None:
        check(asdict(self))
        check_bucket(self.storage, "--storage")


def files(config: VertexConfig) -> dict[str, str]:
    """What `cabochon deploy vertex` writes."""
    steps = _STEPS.format(
        project=config.project,
        region=config.region,
        name=config.name,
        image=config.image,
        storage=config.storage,
        machine=config.machine,
        accelerator=config.accelerator,
        least=config.min_replicas,
        most=config.max_replicas,
        port=PORT,
    )
    return {SCRIPT: script("vertex", config.image, steps), "request.json": json.dumps(_REQUEST, indent=2) + "\n"}
