"""KubeRay's manifests as they reach Kubernetes."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
KUBERNETES = "1.37"
"""Whose schemas they are held against."""

Manifest = dict[str, Any]


def documents(path: Path | str) -> list[Manifest]:
    """Return what a file below the folder holds, with no part that two places share."""
    return json.loads(json.dumps(list(yaml.safe_load_all((FOLDER / path).read_text()))))


def document(path: Path | str) -> Manifest:
    (found,) = documents(path)
    return found


def build(folder: Path, found: tuple[Manifest, ...] = ()) -> tuple[Manifest, ...]:
    """Do what `kubectl kustomize` does, as far as these folders use it."""
    steps = document(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "components", "patches", "replacements"}
    assert steps.keys() <= known
    found += tuple(document(folder / name) for name in steps["resources"])
    for component in steps.get("components", []):
        found = build(folder / component, found)
    for patch in steps.get("patches", []):
        for operation in yaml.safe_load(patch["patch"]):
            for manifest in found:
                if manifest["kind"] == patch["target"]["kind"]:
                    put(manifest, **operation)
    for replacement in steps.get("replacements", []):
        (source,) = (m for m in found if m["kind"] == replacement["source"]["kind"])
        value = source[replacement["source"]["fieldPath"]]
        for target in replacement["targets"]:
            for manifest in found:
                if manifest["kind"] == target["select"]["kind"]:
                    (path,) = target["fieldPaths"]
                    put(manifest, "add", "/" + path.replace(".", "/"), deepcopy(value))
    local = "config.kubernetes.io/local-config"
    return tuple(m for m in found if local not in m["metadata"].get("annotations", {}))


def put(manifest: Manifest, op: str, path: str, value: Any) -> None:
    place: Any = manifest
    *parents, last = path.removeprefix("/").split("/")
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if last == "-":
        place.append(value)
    else:
        assert op == "add" or last in place
        place[last] = value


def cluster_of(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods_of(manifest: Manifest) -> dict[str, Manifest]:
    """Return the pods of a cluster by the name of their group, as KubeRay makes them."""
    cluster = cluster_of(manifest)
    templates = {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}
    pods = deepcopy({"head": cluster["headGroupSpec"]["template"], **templates})
    ray_head = pods["head"]["spec"]["containers"][0]
    options = dict(cluster["autoscalerOptions"])
    del options["idleTimeoutSeconds"]
    pods["head"]["spec"]["containers"].append(
        {"name": "autoscaler", "image": ray_head["image"], **options}
    )
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template.get("metadata", {})},
            "spec": template["spec"],
        }
        for name, template in pods.items()
    }
