"""What `cabochon deploy` writes, and the Dockerfile, as programs that know these formats see them."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cabochon.deploy.gke import GkeConfig, manifests

ROOT = Path(__file__).parents[2]
VERSIONS = ["1.31", "1.34", "1.37"]
CONFIGS = [
    GkeConfig(model="gs://models/a/b", image="registry.example/cabochon:1"),
    GkeConfig(model="google/gemma-2-2b-it", image="registry.example/cabochon:1", name="other", namespace="models"),
]
# The part of Google's resource definition (monitoring.googleapis.com/v1) that we use.
POD_MONITORING = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.googleapis.com/v1"},
        "kind": {"const": "PodMonitoring"},
        "metadata": {"type": "object", "required": ["name", "namespace"]},
        "spec": {
            "type": "object",
            "required": ["selector", "endpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"]},
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["port", "interval"],
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": ["string", "integer"]},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(s|m)$"},
                            "authorization": {
                                "type": "object",
                                "required": ["type", "credentials"],
                                "properties": {
                                    "type": {"const": "Bearer"},
                                    "credentials": {
                                        "type": "object",
                                        "required": ["secret"],
                                        "properties": {"secret": {"type": "object", "required": ["name", "key"]}},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_manifests_are_of_kubernetes_schemas(config: GkeConfig, version: str) -> None:
    documents = list(yaml.safe_load_all(yaml.safe_dump_all(manifests(config))))
    assert len(documents) == 8
    for document in documents:
        if document["kind"] == "PodMonitoring":
            jsonschema.validate(document, POD_MONITORING)
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_is_seen() -> None:
    deployment, *_, monitoring = manifests(CONFIGS[0])[1:]
    deployment["spec"]["template"]["spec"]["containers"][0]["port"] = 80
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)
    monitoring["spec"]["endpoints"][0]["interval"] = 15
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(monitoring, POD_MONITORING)


def test_the_dockerfile_has_no_complaints(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint

    def complaints(file: Path) -> str:
        return subprocess.run([hadolint, file], capture_output=True, text=True).stdout

    assert complaints(ROOT / "Dockerfile") == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text((ROOT / "Dockerfile").read_text().replace("--no-cache-dir ", ""))
    assert "DL3042" in complaints(worse)


def steps(text: str, stage: str) -> list[tuple[str, str]]:
    """The instructions of one stage and their arguments, continuation lines joined."""
    found, current = list[tuple[str, str]](), ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            current = rest.partition(" AS ")[2]
        elif word and not word.startswith("#") and current == stage:
            found.append((word, " ".join(rest.split())))
    return found


@pytest.mark.slow
def test_the_dockerfile_builds_what_serves(tmp_path: Path) -> None:
    """There is no Docker here: the commands of the building stage run in an empty folder, then the entry point does."""
    text = (ROOT / "Dockerfile").read_text()
    home, context = tmp_path / "opt", tmp_path / "src"
    context.mkdir()
    environment: dict[str, Any] = {"PATH": f"{home}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    python = Path(sys.base_prefix, "bin")
    environment["PATH"] = f"{home}/bin:{python}:{environment['PATH']}"
    kept = {line for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    for word, rest in steps(text, "build"):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert f"!{source}" in kept, f"{source} is not sent to Docker"
                copy(ROOT / source, context / target / (source if target == "./" else ""))
        elif word == "RUN" and not rest.startswith("apt-get"):
            command = rest.replace("/opt/cabochon", str(home))
            subprocess.run(["bash", "-o", "pipefail", "-ec", command], cwd=context, env=environment, check=True)
    (entry,) = [rest for word, rest in steps(text, "cpu") if word == "ENTRYPOINT"]
    shutil.rmtree(context)  # the later stages have only /opt/cabochon
    command = [home / "bin" / "python", *yaml.safe_load(entry)[1:], "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: cabochon serve"), done.stderr
    answer = subprocess.run([home / "bin" / "cabochon", "run", "2+2"], env=environment, capture_output=True, text=True)
    assert answer.stdout.endswith("2 + 2 = 4.\n"), answer.stderr


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copy(source, target)
