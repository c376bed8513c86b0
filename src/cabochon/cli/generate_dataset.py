"""`cabochon generate-dataset`: answers to a whole file of prompts, on one machine or many."""

import json as json_format
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError
from cabochon.cli.options import (
    DeviceOptions,
    HubOptions,
    Json,
    SamplingOptions,
    folder_argument,
    load_arguments,
)


def generate_dataset(
    prompts: Annotated[Path, Parameter(help="File or folder of rows with `prompt` or `messages`.")],
    out: Annotated[Path, Parameter(help="The folder to write.")],
    /,
    *,
    model: Annotated[str | None, Parameter(help="A folder or a Hugging Face id; left out: the model inside.")] = None,
    size: Annotated[int, Parameter(help="Prompts to a file.")] = 256,
    ray: Annotated[int, Parameter(help="Engines to start with Ray Data; 0: one, in this process.")] = 0,
    ray_gpus: Annotated[float, Parameter(help="GPUs of each of them.")] = 0.0,
    ray_cpus: Annotated[float, Parameter(help="Cores of each of them, where they have no GPU.")] = 1.0,
    json: Json = False,
    sampling: SamplingOptions = SamplingOptions(),
    device: DeviceOptions = DeviceOptions(),
    hub: HubOptions = HubOptions(),
) -> None:
    """Answer every prompt of a file: a line for each, in the same order, in a folder of files.

    Nothing is left out or chosen, as `cabochon synthesize` does for training. A command that was interrupted goes on
    with the files that are missing when it is given again. With --ray engines run wherever Ray has room for them; all
    machines have to see both paths.

    Example: cabochon generate-dataset prompts.jsonl answers --model google/gemma-2-9b-it --ray 8 --ray-gpus 1
    """
    if size < 1 or ray < 0:
        flag = "--size" if size < 1 else "--ray"
        raise UsageError(f"{flag} cannot be {min(size, ray)}", "it is too small", f"change {flag}")
    settings, folder = sampling.arguments(), folder_argument(out, "OUT")
    from cabochon.lm.dataset import Dataset

    sources = [str(prompts.expanduser().resolve())]
    target = str(folder.resolve())
    dataset = Dataset(sources=sources, out=target, size=size, sampling=settings, model=model or "")
    arguments = load_arguments(model, hub, device)
    if model and Path(model).expanduser().is_dir():  # engines of Ray may start in another folder
        arguments["model"] = str(Path(model).expanduser().resolve())
    try:
        parts = dataset.missing()
        if parts and ray:
            from cabochon.deploy.ray_data import answer

            answer(dataset, parts, arguments, engines=min(ray, len(parts)), gpus=ray_gpus, cpus=ray_cpus)
        elif parts:
            from cabochon.base.progress import track
            from cabochon.lm import load

            lm = load(**arguments)
            with track(len(parts), "answering", unit="files") as advance:
                for part in parts:
                    dataset.answer(lm, part)
                    advance(1)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingResource("there is no Ray here", str(error), "pip install 'cabochon[ray]'") from None
    except OSError as error:
        raise dataset.unwritten(error) from None
    print(json_format.dumps({"folder": str(folder), "files": len(parts)}) if json else folder)
