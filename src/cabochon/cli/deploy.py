"""`cabochon deploy`: a folder with everything that a platform needs to run a model of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cabochon.cli.options import folder_argument
from cabochon.deploy import folder, gke, vertex
from cabochon.deploy import hf as endpoints

Out = Annotated[Path, Parameter(help="The folder to write.")]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace a folder that is not empty.")]


def hf(
    out: Out,
    /,
    *,
    config: Annotated[endpoints.HfConfig, Parameter(name="*", group="The endpoint")],
    overwrite: Overwrite = False,
) -> None:
    """Write what runs a model on Hugging Face Inference Endpoints: a container's definition, and a handler.

    deploy.sh in the folder has the commands. The platform mounts the model, so that nothing is downloaded.

    Example: cabochon deploy hf endpoint --repository me/my-model --image registry.example/me/cabochon:1
    """
    _write(out, endpoints.files(config), overwrite)


def vertex_ai(
    out: Out,
    /,
    *,
    config: Annotated[vertex.VertexConfig, Parameter(name="*", group="The model and its endpoint")],
    overwrite: Overwrite = False,
) -> None:
    """Write what runs a model on Vertex AI: the commands that upload it, make an endpoint and ask it something.

    Example: cabochon deploy vertex endpoint --project mine --storage gs://mine/model --image registry.example/cabochon
    """
    _write(out, vertex.files(config), overwrite)


def kubernetes(
    out: Out,
    /,
    *,
    config: Annotated[gke.GkeConfig, Parameter(name="*", group="The deployment")],
    overwrite: Overwrite = False,
) -> None:
    """Write what runs a model on Google Kubernetes Engine: manifests with probes, figures and an autoscaler.

    Example: cabochon deploy gke cluster --model gs://mine/my-model --image registry.example/cabochon:1
    """
    _write(out, gke.files(config), overwrite)


def _write(out: Path, files: Mapping[str, str], overwrite: bool) -> None:
    target = folder_argument(out, "OUT")
    folder.write(target, files, overwrite=overwrite)
    print(*(target / name for name in files), sep="\n")
