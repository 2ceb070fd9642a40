"""What KubeRay's clusters lie in: who reaches their pods, and that no file holds a secret."""

import re

import kubernetes_validate
import pytest

from serve.keys import KEY_FORM, KeysFile
from tests.unit.manifests import FOLDER, KUBERNETES, Manifest, document, documents

SITE = ["site.yaml", "network_policy.yaml", "keys.example.yaml"]


@pytest.mark.parametrize("name", SITE)
def test_kubernetes_takes_what_clusters_lie_in(name: str) -> None:
    for found in documents(name):
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_no_file_holds_a_secret() -> None:
    for path in FOLDER.rglob("*.yaml"):
        text = path.read_text()
        assert not KEY_FORM.search(text)
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|eyJ[\w-]{10,}", text)
        assert not re.search(r"(?i)(token|password|secret|key), value:", text)
    secret = document("keys.example.yaml")
    assert secret.keys() == {"apiVersion", "kind", "metadata", "stringData"}
    (content,) = secret["stringData"].values()
    assert KeysFile.model_validate_json(content).keys == ()


POLICIES = documents("network_policy.yaml")
HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head", "ray.io/serve": "false"}
NODE = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
SERVER = {**NODE, "ray.io/serve": "true"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def is_let_in(to: dict[str, str], port: int, namespace: str, labels: dict[str, str]) -> bool:
    """Return whether a pod of a namespace reaches one of ours, by the rules of Kubernetes."""

    def selects(selector: Manifest | None, found: dict[str, str]) -> bool:
        return selector is None or selector.get("matchLabels", {}).items() <= found.items()

    def comes_from(peer: Manifest) -> bool:
        names = {"kubernetes.io/metadata.name": namespace}
        is_here = namespace == "bt" if "namespaceSelector" not in peer else True
        return (
            is_here
            and selects(peer.get("namespaceSelector"), names)
            and selects(peer.get("podSelector"), labels)
        )

    chosen = [policy["spec"] for policy in POLICIES if selects(policy["spec"]["podSelector"], to)]
    assert chosen, "a pod that no policy chooses is open to all"
    return any(
        any(map(comes_from, rule["from"]))
        and ("ports" not in rule or port in [found["port"] for found in rule["ports"]])
        for spec in chosen
        for rule in spec.get("ingress", [])
    )


@pytest.mark.parametrize(
    ("to", "ports", "namespace", "labels"),
    [
        (HEAD, [6379, 8265, 10001, 52365], "bt", NODE),
        (NODE, [8076, 10002, 40000], "bt", HEAD),
        (SERVER, [8000], "bt", NODE),
        (HEAD, [8265], "kuberay-system", OPERATOR),
        (SERVER, [8000], "ingress-nginx", {}),
        (HEAD, [8080, 44217, 44227], "monitoring", {}),
        (SERVER, [8080], "monitoring", {}),
    ],
)
def test_who_has_to_reaches_the_pods(to, ports, namespace, labels) -> None:
    assert all(is_let_in(to, port, namespace, labels) for port in ports)


@pytest.mark.parametrize(
    ("namespace", "labels", "but"),
    [
        ("default", NODE, []),
        ("default", OPERATOR, []),
        ("bt", {}, []),
        ("bt", OPERATOR, []),
        ("kuberay-system", {}, []),
        ("kuberay-system", OPERATOR, [(HEAD, 8265)]),
        ("ingress-nginx", NODE, [(SERVER, 8000)]),
        ("monitoring", NODE, [(HEAD, 8080), (NODE, 8080), (SERVER, 8080)]),
    ],
)
def test_nobody_else_does(namespace, labels, but) -> None:
    for to in (HEAD, NODE, SERVER):
        for port in (22, 6379, 8000, 8076, 8080, 8265, 10001, 10002, 52365):
            assert is_let_in(to, port, namespace, labels) == ((to, port) in but), (to, port)
    assert not is_let_in({"app": "another"}, 80, namespace, labels), "in the same namespace"
