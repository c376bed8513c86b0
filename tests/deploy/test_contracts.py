"""Each platform's side of its contract, over real HTTP: probes, routes, bodies, signals.

What the platform is told comes from the files that `cabochon deploy` wrote; only the place where a model is mounted is
another one.
"""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from platforms import TINY, Toolkit, bucket, container, free_port, served

from cabochon.cli.main import main
from cabochon.lm import LM

QUESTION = [{"role": "user", "content": "What is 2+3?"}]
IMAGE = "registry.example/me/cabochon:1"


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*arguments: str) -> Path:
        platform, *flags = arguments
        assert main(["deploy", platform, str(tmp_path / platform), "--image", IMAGE, *flags]) == 0
        return tmp_path / platform

    return write


def answer(lm: LM) -> str:
    return lm.chat(QUESTION, max_new_tokens=100).text


# Hugging Face


def test_hf_container(written: Callable[..., Path], lm: LM) -> None:
    definition = json.loads((written("hf", "--repository", "me/m") / "endpoint.json").read_text())["model"]
    image = definition["image"]["custom"]
    assert image["url"] == IMAGE and definition["env"]["CABOCHON_MODEL"] == "/repository"
    port = free_port()
    environment = {**definition["env"], "CABOCHON_MODEL": str(TINY), "PORT": str(port)}
    with container(environment, port=port, ready=image["healthRoute"]) as running:
        body = {"model": "me/m", "messages": QUESTION, "temperature": 0}
        got = running.client.post("/v1/chat/completions", json=body).json()
        assert got["choices"][0]["message"]["content"] == answer(lm)


def test_hf_definition_is_what_their_own_client_sends(written: Callable[..., Path], monkeypatch: Any) -> None:
    from huggingface_hub import hf_api

    ours = json.loads((written("hf", "--repository", "me/m", "--min-replicas", "1") / "endpoint.json").read_text())
    sent: dict[str, Any] = {}

    def post(url: str, *, json: Any, **_: Any) -> None:
        assert url.endswith("/v2/endpoint/me")
        sent.update(json)
        raise ConnectionError

    monkeypatch.setattr(hf_api, "get_session", lambda: SimpleNamespace(post=post))
    model, compute = ours["model"], ours["compute"]
    with pytest.raises(ConnectionError):
        hf_api.HfApi(token="none").create_inference_endpoint(
            ours["name"],
            repository=model["repository"],
            framework=model["framework"],
            task=model["task"],
            accelerator=compute["accelerator"],
            vendor=ours["provider"]["vendor"],
            region=ours["provider"]["region"],
            type=ours["type"],
            instance_size=compute["instanceSize"],
            instance_type=compute["instanceType"],
            min_replica=1,
            max_replica=compute["scaling"]["maxReplica"],
            scale_to_zero_timeout=compute["scaling"]["scaleToZeroTimeout"],
            custom_image=model["image"]["custom"],
            env=model["env"],
            namespace="me",
        )
    assert sent == ours


def test_hf_handler(written: Callable[..., Path], lm: LM) -> None:
    """Their own server, which finds handler.py in the repository and posts what it is sent to its class."""
    server = Toolkit(written("hf", "--repository", "me/m") / "handler.py", TINY)
    with served(server):

        def ask(**body: Any) -> Any:
            got = server.client.post("/", json=body)
            assert got.status_code == 200, got.text
            return got.json()

        assert ask(inputs=QUESTION) == [{"generated_text": answer(lm)}]
        short = {"max_new_tokens": 5}
        expected = lm.generate("Once upon", **short).text
        assert ask(inputs="Once upon", parameters=short) == [{"generated_text": expected}]
        whole = {**short, "return_full_text": True}
        assert ask(inputs=["Once upon"] * 2, parameters=whole)[1]["generated_text"] == "Once upon" + expected
        drawn = {"do_sample": True, "seed": 3, "stop": ["."], "max_new_tokens": 20}
        assert ask(inputs="Once", parameters=drawn) == ask(inputs="Once", parameters=drawn)
        for wrong in ({}, [5], {"inputs": 5}, {"inputs": []}, {"inputs": ["a", 5]}, {"inputs": "a", "parameters": 5},
                      {"inputs": "a", "parameters": {"beams": 3}}, {"inputs": "a", "parameters": {"top_p": 7}},
                      {"inputs": "a", "parameters": {"temperature": "hot"}}, {"inputs": "a", "parameters": {"stop": 5}},
                      {"inputs": [{"role": "system", "content": "x"}]}):  # fmt: skip
            got = server.client.post("/", json=wrong)
            assert got.status_code == 400 and got.json()["kind"] == "ValueError", wrong
            assert re.fullmatch(r".+[;:] .+", got.json()["error"]), got.text


# Vertex AI


def test_vertex(written: Callable[..., Path], lm: LM, tmp_path: Path) -> None:
    """The script's own flags say which routes there are and where the model lies; the container fetches it."""
    folder = written("vertex", "--project", "p", "--storage", "gs://models/tiny")
    said = ran(folder, tmp_path, {"MODEL": str(TINY)})
    upload = flags(next(line for line in said if line.startswith("gcloud ai models upload")))
    assert upload["container-image-uri"] == IMAGE and "gcloud storage rsync" in said[0]
    name, _, value = upload["container-env-vars"].partition("=")
    port = free_port()
    objects = {f"tiny/{file.name}": file.read_bytes() for file in TINY.iterdir()}
    with bucket(objects) as server:
        environment = {
            name: value,
            "AIP_HTTP_PORT": str(port),
            "AIP_HEALTH_ROUTE": upload["container-health-route"],
            "AIP_PREDICT_ROUTE": upload["container-predict-route"],
            "AIP_STORAGE_URI": upload["artifact-uri"],
            "TMPDIR": str(tmp_path),
            **server.environment,
        }
        with container(environment, port=port, ready=environment["AIP_HEALTH_ROUTE"]) as running:

            def predict(**body: Any) -> httpx.Response:
                return running.client.post(environment["AIP_PREDICT_ROUTE"], json=body)

            instance = {"@requestFormat": "chatCompletions", "messages": QUESTION, "temperature": 0}
            texts = [{"prompt": "Once upon", "max_tokens": 5, "temperature": 0},
                     {"inputs": "Once upon", "parameters": {"max_new_tokens": 5}}]  # fmt: skip
            got = predict(instances=[instance, *texts]).json()["predictions"]
            once = lm.generate("Once upon", max_new_tokens=5).text
            assert got[0]["choices"][0]["message"]["content"] == answer(lm) and got[0]["model"] == "cabochon"
            assert got[1:] == [once, once]
            shared = predict(instances=["Once upon", "Once upon"], parameters={"max_tokens": 5, "temperature": 0})
            assert shared.json() == {"predictions": [once, once]}
            several = predict(instances=[{"prompt": "Once", "n": 2, "max_tokens": 2}]).json()["predictions"]
            assert [len(several), len(several[0])] == [1, 2]
            request = json.loads((folder / "request.json").read_text())
            assert len(predict(**request).json()["predictions"]) == 2
            for wrong in ([], [5], ["x"] * 65, [{}], [{"@requestFormat": "other", "prompt": "x"}], "x",
                          [{"prompt": "x", "stream": True}], [instance, {"prompt": [2**40]}]):  # fmt: skip
                assert predict(instances=wrong).status_code == 400, wrong
            assert predict(instances=["x"], parameters=[]).status_code == 400
            for one in ("x", {"prompt": "x"}, instance):
                assert predict(instances=[one], parameters={"stream": True}).status_code == 400, one
    assert {path.rpartition("%2F")[2].partition("?")[0] for path in server.asked if "alt=media" in path} == {
        file.name for file in TINY.iterdir()
    }


def ran(folder: Path, place: Path, environment: dict[str, str]) -> list[str]:
    """The commands that a deploy script runs, none of which is the real one."""
    programs, log = place / "bin", place / "log"
    programs.mkdir()
    for name in ("docker", "gcloud", "kubectl", "curl", "hf"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s" {name} >> {log}\nfor a; do printf " %s" "$a" >> {log}\n'
                                     f'done\necho >> {log}\necho id-1\n')  # fmt: skip
        (programs / name).chmod(stat.S_IRWXU)
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run([folder / "deploy.sh"], check=True, env={**environment, "PATH": path}, capture_output=True)
    return log.read_text().splitlines()


def flags(command: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+)=(.*?)(?= --|$)", command))


@pytest.mark.parametrize(
    "arguments",
    [["hf", "--repository", "me/m"], ["vertex", "--project", "p", "--storage", "gs://models/a"],
     ["gke", "--model", "gs://models/a"], ["gke", "--model", "google/gemma-2-2b-it"]],
    ids=" ".join,
)  # fmt: skip
def test_scripts_build_push_upload_and_deploy(written: Any, tmp_path: Path, arguments: list[str]) -> None:
    environment = {"SOURCE": "/source", "MODEL": "/model", "HF_TOKEN": "t", "NAMESPACE": "me"}
    said = ran(written(*arguments), tmp_path, environment)
    assert said[:2] == [f"docker build --target cuda --tag {IMAGE} /source", f"docker push {IMAGE}"]
    assert any("/model" in line for line in said) == ("gemma" not in arguments[2])
    assert said[-1].startswith(("curl", "gcloud ai endpoints predict id-1", "kubectl rollout status"))
    for line in said:
        for file in re.findall(rf"{re.escape(str(tmp_path))}\S+", line):
            assert Path(file).is_file()


# Kubernetes


def test_gke(written: Callable[..., Path], lm: LM) -> None:
    """What a kubelet, Prometheus and an autoscaler do with the manifests."""
    text = (written("gke", "--model", "gs://models/a") / "cabochon.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    found = {document["kind"]: document["spec"] for document in documents if "spec" in document}
    pod = found["Deployment"]["template"]
    spec, labels = pod["spec"], pod["metadata"]["labels"].items()
    for chosen in (found["Service"]["selector"], found["PodMonitoring"]["selector"]["matchLabels"],
                   found["PodDisruptionBudget"]["selector"]["matchLabels"]):  # fmt: skip
        assert chosen.items() <= labels
    (only,) = spec["containers"]
    (opened,) = only["ports"]
    assert found["Service"]["ports"][0]["targetPort"] == opened["name"]
    secrets = {("cabochon", "api-key"): "secret"}
    port = free_port()
    environment = {}
    for one in only["env"]:
        secret = one.get("valueFrom", {}).get("secretKeyRef")
        environment[one["name"]] = one["value"] if secret is None else secrets[secret["name"], secret["key"]]
    mounted = {mount["mountPath"] for mount in only["volumeMounts"]}
    assert environment["CABOCHON_MODEL"] in mounted and environment["PORT"] == str(opened["containerPort"])
    environment |= {"CABOCHON_MODEL": str(TINY), "PORT": str(port)}
    ready = only["startupProbe"]["httpGet"]["path"]
    with container(environment, port=port, ready=ready, arguments=["--drain-seconds", "20"]) as running:
        for probe in ("readinessProbe", "livenessProbe"):
            assert only[probe]["httpGet"]["port"] == opened["name"]
            assert running.status(only[probe]["httpGet"]["path"]) == 200
        (scraped,) = found["PodMonitoring"]["endpoints"]
        assert running.status(scraped["path"]) == 401
        secret = scraped["authorization"]["credentials"]["secret"]
        role, binding = (next(d for d in documents if d["kind"] == kind) for kind in ("Role", "RoleBinding"))
        (may,), (who,) = role["rules"], binding["subjects"]
        assert may["resourceNames"] == [secret["name"]] and set(may["verbs"]) == {"get", "list", "watch"}
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert (who["namespace"], who["name"]) == ("gmp-system", "collector")
        key = {"Authorization": f"{scraped['authorization']['type']} {secrets[secret['name'], secret['key']]}"}
        figures = running.client.get(scraped["path"], headers=key).text
        prefix, metric, kind = found["HorizontalPodAutoscaler"]["metrics"][0]["pods"]["metric"]["name"].split("|")
        assert prefix == "prometheus.googleapis.com" and f"# TYPE {metric} {kind}\n" in figures
        assert re.search(rf"^{metric} 0$", figures, re.MULTILINE)
        body = {"messages": QUESTION, "temperature": 0}
        got = running.client.post("/v1/chat/completions", json=body, headers=key).json()
        assert got["choices"][0]["message"]["content"] == answer(lm)
    assert spec["terminationGracePeriodSeconds"] >= 120 + only["lifecycle"]["preStop"]["sleep"]["seconds"]


# The entry point of the image


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CABOCHON_FLAGS": "'"}, "CABOCHON_FLAGS"), ({"AIP_STORAGE_URI": "gs:///x"}, "no place"),
     ({"CABOCHON_MODEL": "/nowhere"}, "no model"), ({"CABOCHON_FLAGS": "--max-n 0"}, "--max-n"),
     ({"AIP_PREDICT_ROUTE": "predict"}, "--predict-route")],
)  # fmt: skip
def test_a_container_that_cannot_start_says_why(environment: dict[str, str], said: str) -> None:
    environment = {"PATH": os.environ["PATH"], "PORT": str(free_port()), **environment}
    command = [sys.executable, "-m", "cabochon.deploy.container"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode in (2, 3, 4) and said in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["hf", "--repository", "a b"], "--repository"), (["hf", "--repository", "m", "--name", "A"], "--name"),
     (["vertex", "--project", "$(x)", "--storage", "gs://models/a"], "--project"),
     (["vertex", "--project", "p", "--storage", "/models"], "--storage"),
     (["gke", "--model", "s3://models/a"], "--model"), (["gke", "--model", "m", "--waiting", "0"], "--waiting"),
     (["gke", "--model", "m", "--min-replicas", "9"], "--min-replicas")],
)  # fmt: skip
def test_what_no_platform_could_use(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    platform, *flags = arguments
    assert main(["deploy", platform, str(tmp_path / "out"), "--image", IMAGE, *flags]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_overwriting_keeps_what_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["deploy", "hf", str(tmp_path / "out"), "--repository", "me/m", "--image", IMAGE]
    assert [main(command), main(command), main([*command, "--overwrite"])] == [0, 2, 0]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2 and "notes.txt in it would be lost" in capsys.readouterr().err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
