"""Google Kubernetes Engine: manifests for any number of pods, one GPU each, behind one service."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from cabochon.deploy.folder import SCRIPT, check, check_bucket, script

MOUNT, PORT, GRACE = "/repository", 8080, 150  # GRACE: --drain-seconds and some more
WAITING = "prometheus.googleapis.com|cabochon_requests_waiting|gauge"  # as the adapter for Managed Prometheus names it
_STEPS = """\
# What a cluster needs once: the adapter that shows Managed Prometheus' figures to autoscalers (Google's documentation
# calls it the Custom Metrics Stackdriver Adapter), and a key for whoever may ask:
#   kubectl create secret generic {name} --namespace {namespace} --from-literal=api-key="$(openssl rand -hex 32)"
{model}
kubectl apply --filename "$here/cabochon.yaml"
kubectl rollout status deployment/{name} --namespace {namespace} --timeout=30m
"""
_BUCKET = """\

# The model's folder, as `cabochon` saves and quantises it. The service account {name} has to be allowed to read it.
if [ -n "${{MODEL:-}}" ]; then
    gcloud storage rsync --recursive "$MODEL" "{model}"
fi
"""


@dataclass(frozen=True, kw_only=True)
class GkeConfig:
    """A deployment.

    Args:
        model: gs://bucket/path, which is mounted, or a Hugging Face id, which each pod fetches.
        image: The container's address in a registry.
        name: Of all objects.
        namespace: Of all objects.
        accelerator: The GPU, as GKE's node label calls it.
        memory: Of a pod, in Kubernetes' units.
        min_replicas: At least so many pods.
        max_replicas: At most so many.
        waiting: Answers that wait in a pod, on average, before there is another pod.
    """

    model: str
    image: str
    name: str = "cabochon"
    namespace: str = "default"
    accelerator: str = "nvidia-l4"
    memory: str = "24Gi"
    min_replicas: int = 1
    max_replicas: int = 4
    waiting: int = 8

    def __post_init__(self) -> None:
        check(asdict(self))
        if "://" in self.model:
            check_bucket(self.model, "--model")


def manifests(config: GkeConfig) -> list[dict[str, Any]]:
    """All objects, in the order in which they are applied."""
    return [
        _object(config, "v1", "ServiceAccount"),
        _object(config, "apps/v1", "Deployment", spec=_deployment(config)),
        _object(
            config,
            "v1",
            "Service",
            spec={"selector": _labels(config), "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        ),
        _object(
            config,
            "policy/v1",
            "PodDisruptionBudget",
            spec={"maxUnavailable": 1, "selector": {"matchLabels": _labels(config)}},
        ),
        _object(config, "autoscaling/v2", "HorizontalPodAutoscaler", spec=_autoscaler(config)),
        *_readers(config),
        _object(config, "monitoring.googleapis.com/v1", "PodMonitoring", spec=_monitoring(config)),
    ]


def files(config: GkeConfig) -> dict[str, str]:
    """What `cabochon deploy gke` writes."""
    bucket = _BUCKET.format(name=config.name, model=config.model) if _in_bucket(config) else ""
    steps = _STEPS.format(name=config.name, namespace=config.namespace, model=bucket)
    text = yaml.safe_dump_all(manifests(config), sort_keys=False, width=120)
    return {"cabochon.yaml": text, SCRIPT: script("gke", config.image, steps)}


def _in_bucket(config: GkeConfig) -> bool:
    return config.model.startswith("gs://")


def _labels(config: GkeConfig) -> dict[str, str]:
    return {"app.kubernetes.io/name": "cabochon", "app.kubernetes.io/instance": config.name}


def _object(config: GkeConfig, version: str, kind: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": config.name, "namespace": config.namespace, "labels": _labels(config)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def _secret(config: GkeConfig, key: str, *, optional: bool = False) -> dict[str, Any]:
    chosen: dict[str, Any] = {"name": config.name, "key": key}
    return {"secretKeyRef": chosen | ({"optional": True} if optional else {})}


def _deployment(config: GkeConfig) -> dict[str, Any]:
    pod = {
        "metadata": {
            "labels": _labels(config),
            "annotations": {"gke-gcsfuse/volumes": "true"} if _in_bucket(config) else {},
        },
        "spec": {
            "serviceAccountName": config.name,
            "automountServiceAccountToken": _in_bucket(config),
            "nodeSelector": {"cloud.google.com/gke-accelerator": config.accelerator},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "terminationGracePeriodSeconds": GRACE,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(config)],
            "volumes": _volumes(config),
        },
    }
    return {"selector": {"matchLabels": _labels(config)}, "template": pod}  # how many is the autoscaler's


def _container(config: GkeConfig) -> dict[str, Any]:
    inside = _in_bucket(config)
    environment: list[Mapping[str, Any]] = [
        {"name": "CABOCHON_MODEL", "value": MOUNT if inside else config.model},
        {"name": "CABOCHON_FLAGS", "value": f"--model-name {config.name}"},
        {"name": "PORT", "value": str(PORT)},
        {"name": "HF_HOME", "value": "/tmp/huggingface"},
        {"name": "CABOCHON_API_KEY", "valueFrom": _secret(config, "api-key")},
        {"name": "HF_HUB_OFFLINE", "value": "1"}
        if inside
        else {"name": "HF_TOKEN", "valueFrom": _secret(config, "hf-token", optional=True)},
    ]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    if inside:
        mounts.append({"name": "model", "mountPath": MOUNT, "readOnly": True})
    resources = {"nvidia.com/gpu": 1, "memory": config.memory}
    return {
        "name": "cabochon",
        "image": config.image,
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": environment,
        "resources": {"requests": {"cpu": 4, **resources}, "limits": resources},
        "startupProbe": _probe("/ready", 10, 180),  # half an hour for a large model
        "readinessProbe": _probe("/ready", 5, 2),
        "livenessProbe": _probe("/health", 10, 6),
        "lifecycle": {"preStop": {"sleep": {"seconds": 10}}},  # until nobody is sent here any more
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _probe(path: str, seconds: int, failures: int) -> dict[str, Any]:
    asked = {"path": path, "port": "http"}
    return {"httpGet": asked, "periodSeconds": seconds, "timeoutSeconds": 5, "failureThreshold": failures}


def _volumes(config: GkeConfig) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    if _in_bucket(config):
        bucket, _, path = config.model.removeprefix("gs://").partition("/")
        options = "implicit-dirs" + (f",only-dir={path.strip('/')}" if path.strip("/") else "")
        attributes = {"bucketName": bucket, "mountOptions": options}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
        volumes.append({"name": "model", "csi": driver})
    return volumes


def _autoscaler(config: GkeConfig) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": str(config.waiting)}
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": config.name},
        "minReplicas": config.min_replicas,
        "maxReplicas": config.max_replicas,
        "metrics": [{"type": "Pods", "pods": {"metric": {"name": WAITING}, "target": target}}],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
    }


def _monitoring(config: GkeConfig) -> dict[str, Any]:
    secret = {"name": config.name, "key": "api-key"}
    asked = {"type": "Bearer", "credentials": {"secret": secret}}
    endpoint = {"port": "http", "path": "/metrics", "interval": "15s", "authorization": asked}
    return {"selector": {"matchLabels": _labels(config)}, "endpoints": [endpoint]}


def _readers(config: GkeConfig) -> list[dict[str, Any]]:
    """Managed Prometheus' collectors may read the key that figures are asked with, which they may not by themselves."""
    group = "rbac.authorization.k8s.io"
    secret = {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [config.name]}
    return [
        _object(config, f"{group}/v1", "Role", rules=[secret | {"verbs": ["get", "list", "watch"]}]),
        _object(
            config,
            f"{group}/v1",
            "RoleBinding",
            roleRef={"apiGroup": group, "kind": "Role", "name": config.name},
            subjects=[{"kind": "ServiceAccount", "name": "collector", "namespace": "gmp-system"}],
        ),
    ]
