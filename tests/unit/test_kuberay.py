"""What Kubernetes, KubeRay, Ray and this project read in KubeRay's manifests holds there.

It needs no cluster. Pods are validated by the schemas of Kubernetes; KubeRay's own fields by the
models below, and by its whole CRDs if BT_KUBERAY_CRDS names a folder with them; pools are read by
Ray's own autoscaler, and commands by this project's own command line.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import jsonschema
import kubernetes_validate
import pytest
import ray
import typer.main
import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from bt_core import __version__, storage
from jobs.cli import app
from serve.gateway import Gateway
from tests.unit.manifests import (
    FOLDER,
    KUBERNETES,
    Manifest,
    build,
    cluster_of,
    document,
    documents,
    pods_of,
)
from tests.unit.test_ray_cluster import AWS, read

BUILT = ["tune", "score", "serve"]


class Strict(BaseModel):
    """Knows the fields that we use, and no other."""

    model_config = ConfigDict(extra="forbid", strict=True)


# The names and types are those of KubeRay 1.7.0 (its API reference and ray-operator/apis/ray/v1).


class AuthOptions(Strict):
    mode: Literal["token"]  # never disabled


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: PositiveInt
    resources: Manifest
    securityContext: Manifest
    volumeMounts: list[Manifest]


class HeadGroup(Strict):
    resources: dict[str, str]
    rayStartParams: dict[str, str]
    template: Manifest


class WorkerGroup(Strict):
    groupName: str
    labels: dict[str, str]
    minReplicas: NonNegativeInt
    maxReplicas: PositiveInt
    rayStartParams: dict[str, str]
    template: Manifest


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["HTTPMode"]
    backoffLimit: PositiveInt
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: PositiveInt
    rayClusterSpec: RayClusterSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster"]


class RayServiceSpec(Strict):
    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: Literal[True]
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


SPECS = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec, "RayService": RayServiceSpec}


@pytest.fixture(scope="module", params=["ray_cluster", *BUILT])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    if request.param == "ray_cluster":
        return document("ray_cluster/ray_cluster.yaml")
    (built,) = build(FOLDER / request.param)
    return built


@pytest.fixture(scope="module")
def pods(manifest: Manifest) -> dict[str, Manifest]:
    return pods_of(manifest)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("name", BUILT)
def test_kubectl_builds_the_same(name: str) -> None:
    shown = subprocess.run(
        ["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True, check=True
    )
    assert list(yaml.safe_load_all(shown.stdout)) == list(build(FOLDER / name))


def test_kuberay_knows_every_field(manifest: Manifest) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["metadata"]["namespace"] == "bt"
    SPECS[manifest["kind"]].model_validate(manifest["spec"])


def closed(schema: Manifest) -> Manifest:
    """Return a schema of a CRD as one that refuses fields that it does not name."""
    result = {
        key: {name: closed(value) for name, value in found.items()}
        if key == "properties"
        else closed(found)
        if key in ("items", "additionalProperties") and isinstance(found, dict)
        else found
        for key, found in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def test_a_closed_schema_refuses_what_it_does_not_name() -> None:
    inner = {"type": "object", "properties": {"mode": {"type": "string", "enum": ["token"]}}}
    schema = closed({"properties": {"spec": {"type": "array", "items": inner}}})
    jsonschema.validate({"spec": [{"mode": "token"}]}, schema)
    for wrong in ({"spec": [{"mood": "token"}]}, {"spec": [{"mode": "open"}]}, {"specs": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.skipif("BT_KUBERAY_CRDS" not in os.environ, reason="BT_KUBERAY_CRDS is not set")
def test_the_whole_crds_take_it(manifest: Manifest) -> None:
    name = f"ray.io_{manifest['kind'].lower()}s.yaml"
    crd = yaml.safe_load((Path(os.environ["BT_KUBERAY_CRDS"]) / name).read_text())
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
    jsonschema.validate(manifest, closed(schema))


def test_kubernetes_takes_every_pod(pods: dict[str, Manifest]) -> None:
    assert pods.keys() == {"head", "cpu", "gpu"}
    for pod in pods.values():
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_every_mount_has_its_volume(pods: dict[str, Manifest]) -> None:
    for pod in pods.values():
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        mounted = [m["name"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]]
        assert len(volumes) == len(set(volumes))
        assert set(volumes) == set(mounted)


def test_no_container_runs_as_root_or_may_become_it(pods: dict[str, Manifest]) -> None:
    for pod in pods.values():
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == 1000, "the image's"
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not any("hostPath" in volume for volume in pod["spec"]["volumes"])
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }


def test_every_container_can_write_where_ray_does(pods: dict[str, Manifest]) -> None:
    for pod in pods.values():
        kinds = {v["name"]: v.get("emptyDir") for v in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            places = {m["mountPath"]: kinds[m["name"]] for m in container["volumeMounts"]}
            assert places["/tmp"]["sizeLimit"]
            if container["name"] != "autoscaler":
                assert places["/home/bt"]["sizeLimit"]
                assert places["/dev/shm"] == {"medium": "Memory"}


def test_memory_is_asked_for_as_it_is_limited(pods: dict[str, Manifest]) -> None:
    for pod in pods.values():
        for container in pod["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_only_the_autoscaler_may_ask_kubernetes(pods: dict[str, Manifest]) -> None:
    for pod in pods.values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        (*rest, last) = pod["spec"]["containers"]
        assert not any("serviceaccount" in m["mountPath"] for c in rest for m in c["volumeMounts"])
        assert last["name"] == "autoscaler" or not rest
    mounts = pods["head"]["spec"]["containers"][1]["volumeMounts"]
    assert "/var/run/secrets/kubernetes.io/serviceaccount" in [m["mountPath"] for m in mounts]


def test_spot_machines_are_for_workers(pods: dict[str, Manifest]) -> None:
    assert "tolerations" not in pods["head"]["spec"]
    for name in ("cpu", "gpu"):
        keys = {toleration["key"] for toleration in pods[name]["spec"]["tolerations"]}
        assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= keys
        assert ("nvidia.com/gpu" in keys) == (name == "gpu")


def test_ray_and_the_image_are_those_that_are_tested(
    manifest: Manifest, pods: dict[str, Manifest]
) -> None:
    assert cluster_of(manifest)["rayVersion"] == ray.__version__
    images = {c["image"] for pod in pods.values() for c in pod["spec"]["containers"]}
    assert images == {f"registry.example.org/bt:{__version__}"}


def test_rays_autoscaler_finds_the_pools(manifest: Manifest) -> None:
    cluster = {"metadata": manifest["metadata"], "spec": cluster_of(manifest)}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"] == {"CPU": 0, "scoring_job": 1, "memory": 12 * 2**30}
    assert types["headgroup"]["max_workers"] == 0
    assert types["cpu"]["resources"].keys() == {"CPU", "memory"}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert {types[name]["labels"]["pool"] for name in ("cpu", "gpu")} == {"cpu", "gpu"}
    if manifest["kind"] == "RayCluster":
        aws = read(AWS)["available_node_types"]
        for name in ("cpu", "gpu"):
            for limit in ("min_workers", "max_workers"):
                assert types[name][limit] == aws[name][limit]


@pytest.mark.parametrize("name", ["tune", "score"])
def test_jobs_are_commands_that_go_on_from_shared_storage(name: str) -> None:
    (job,) = build(FOLDER / name)
    command, _, accepted = job["spec"]["entrypoint"].partition(" || ")
    python, option, module, *words = shlex.split(command)
    assert [python, option, module] == ["python", "-m", f"jobs.{name}"]
    with typer.main.get_command(app).commands[name].make_context(name, list(words)) as context:
        given = context.params
    assert given["out"].startswith("/shared/")
    assert given["overwrite"] is False
    assert all(word.startswith(("/shared/", "-")) for word in words)
    assert all(storage.refuse_secrets(word) is None for word in words)
    # Code 3 of bt score: finished, and some scans could not be scored.
    assert accepted == ("test $? -eq 3" if name == "score" else "")


def test_the_server_has_its_keys_and_audit_log_where_it_runs() -> None:
    (service,) = build(FOLDER / "serve")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ensemble, gateway = config["applications"]
    assert config["http_options"]["port"] == 8000, "the network policy's"
    (deployment,) = gateway["deployments"]
    chosen = deployment["ray_actor_options"]
    assert chosen["num_cpus"] == Gateway.ray_actor_options["num_cpus"]
    (group,) = (
        g
        for g in cluster_of(service)["workerGroupSpecs"]
        if g["labels"] == chosen["label_selector"]
    )
    pods = pods_of(service)
    volumes = {v["name"]: v for v in pods[group["groupName"]]["spec"]["volumes"]}
    (container,) = pods[group["groupName"]]["spec"]["containers"]
    mounted = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
    folder, name = gateway["args"]["keys"].rsplit("/", 1)
    example = document("keys.example.yaml")
    assert mounted[folder]["secret"]["secretName"] == example["metadata"]["name"]
    assert name in example["stringData"]
    assert mounted[gateway["args"]["audit_dir"]]["persistentVolumeClaim"]["claimName"] == "audit"
    for other in pods.keys() - {group["groupName"]}:
        assert not any("secret" in volume for volume in pods[other]["spec"]["volumes"])
    assert all(a["args"]["bundle"].startswith("/shared/") for a in (ensemble, gateway))


def test_what_pods_name_is_there(pods: dict[str, Manifest]) -> None:
    site = {(d["kind"], d["metadata"]["name"]): d for d in documents("site.yaml")}
    labels = site["Namespace", "bt"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods.values():
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in site
        for volume in pod["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                found = site["PersistentVolumeClaim", claim["claimName"]]
                assert found["spec"]["accessModes"] == ["ReadWriteMany"]
