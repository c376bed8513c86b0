"""An OpenVINO model from a Hugging Face folder of Gemma 2: `peer_openvino_files.py FOLDER OUT`.

OUT ends in -int4 or -int8. It is made as `optimum-cli export openvino` makes it, with one change: for Gemma 2 that
forces transformers' "sdpa" attention, which has no soft cap, so that another model comes out. "eager" keeps the cap.
"""

import shutil
import sys
from pathlib import Path

import openvino as ov
from optimum.commands.optimum_cli import main as optimum_cli
from optimum.exporters.openvino import __main__ as exporter


def export(folder: Path, out: Path, format: str) -> None:
    """Write the model and, for OpenVINO GenAI, its tokenizer."""
    exporter.FORCE_ATTN_MODEL_CLASSES["gemma2"] = "eager"
    words = f"optimum-cli export openvino --task text-generation-with-past --weight-format {format}".split()
    sys.argv = [*words, "--model", str(folder), str(out)]
    optimum_cli()


def caps(out: Path) -> int:
    """Soft caps in the graph: hyperbolic tangents, since the activation is one operation of its own."""
    model = ov.Core().read_model(out / "openvino_model.xml")
    return sum(node.get_type_name() == "Tanh" for node in model.get_ops())


def main() -> None:
    """Command line. The folder appears under its name only when it is whole."""
    folder, out = map(Path, sys.argv[1:])
    partial = out.with_name(f"{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    export(folder, partial, out.name.rpartition("-")[2])
    partial.replace(out)
    print(f"{out.name}: {caps(out)} soft caps in the graph")


if __name__ == "__main__":
    main()
