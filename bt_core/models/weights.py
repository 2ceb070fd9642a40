"""Initial weights: what recipes ask for, and folders of them for sites without internet.

A folder is timm's: `config.json` and `model.safetensors`; ours has `SHA256SUMS` beside them, in the
format of sha256sum.
"""

import hashlib
import os
from typing import Any, Final

import safetensors.torch
from torch import nn

from bt_core import storage
from bt_core.errors import WeightsError
from bt_core.models.backbones import read_config, timm_with
from bt_core.models.spec import ModelSpec

WEIGHTS_FILE: Final = "model.safetensors"
SUMS_FILE: Final = "SHA256SUMS"


def hub_id(backbone: str) -> str:
    """Return where timm downloads a backbone's weights from; empty if it has none."""
    config = timm_with(backbone).get_pretrained_cfg(backbone)
    return str(config.hf_hub_id or config.url or "") if config else ""


def is_cached(backbone: str) -> bool:
    """Return whether the hub's copy of a backbone's weights lies on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    place = hub_id(backbone)
    if not place or "://" in place:
        return False
    return isinstance(try_to_load_from_cache(place, WEIGHTS_FILE), str)


def stage_weights(backbone: str, source: str, folder: str) -> str:
    """Write a backbone's weights, with the classifier they came with, as a folder of timm's.

    Args:
        backbone: a name of timm's.
        source: `hub`, or `local-dir:PATH`.
        folder: where to; it must be free.

    Returns:
        The SHA-256 of the weights.

    Raises:
        WeightsError: if the weights cannot be had, or the folder holds something.
    """
    spec = ModelSpec(backbone=backbone, weights=source)
    timm = timm_with(backbone)
    folder = storage.absolute(folder)
    if os.path.isdir(folder) and os.listdir(folder):
        raise WeightsError(f"{folder} is not empty; choose another folder")
    arguments: dict[str, Any] = {}
    if spec.weights_source == "local-dir":
        arguments = read_config(spec).get("model_args", {})
    name = backbone if spec.weights_source == "hub" else spec.weights
    try:
        model = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub client raises many types
        raise WeightsError(
            f"cannot load {source} weights of {backbone} ({type(error).__name__}); hub needs "
            "internet, local-dir:PATH a folder of timm's"
        ) from error
    beside = f"{folder}.tmp"
    storage.remove_dir(beside)
    timm.models.save_for_hf(model, beside, model_args=arguments or None, safe_serialization=True)
    os.chmod(os.path.join(beside, WEIGHTS_FILE), 0o644)  # written for its owner alone
    digests = {n: _digest(os.path.join(beside, n)) for n in ("config.json", WEIGHTS_FILE)}
    sums = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    storage.write_bytes(os.path.join(beside, SUMS_FILE), sums.encode())
    storage.move_dir(beside, folder)
    return digests[WEIGHTS_FILE]


def check_weights(folder: str) -> dict[str, Any]:
    """Check a folder of weights: digests, if SHA256SUMS is there, and every tensor's shape.

    Returns:
        architecture, num_parameters, sha256 of the weights, and whether digests were compared.

    Raises:
        WeightsError: says what is wrong: a changed file, and tensors that are missing, unknown or
            of another shape.
    """
    folder = storage.absolute(folder)
    config = read_config(ModelSpec(backbone="", weights=f"local-dir:{folder}"))
    path = os.path.join(folder, WEIGHTS_FILE)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    has_sums = os.path.exists(os.path.join(folder, SUMS_FILE))
    if has_sums:
        _compare_digests(folder)
    if "architecture" not in config:
        raise WeightsError(f"{folder}/config.json names no architecture; is it a folder of timm's?")
    architecture = str(config["architecture"])
    arguments = {"num_classes": config.get("num_classes"), **config.get("model_args", {})}
    model = timm_with(architecture).create_model(
        architecture, **{k: v for k, v in arguments.items() if v is not None}
    )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"{n} is missing" for n in sorted(expected.keys() - found.keys())]
    faults += [f"{n} is unknown" for n in sorted(found.keys() - expected.keys())]
    faults += [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in sorted(expected.keys() & found.keys())
        if expected[n] != found[n]
    ]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if faults[5:] else "")
        raise WeightsError(f"{path} does not fit {architecture}: {shown}")
    return {
        "architecture": architecture,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "sha256": _digest(path),
        "digests_compared": has_sums,
    }


def initial_sha256(backbone: nn.Module, source: str) -> str:
    """Return the SHA-256 of all tensors that a backbone starts from; `none` without weights.

    Args:
        backbone: with its initial weights.
        source: `ModelSpec.weights_source`.
    """
    if source == "none":
        return source
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compare_digests(folder: str) -> None:
    lines = storage.read_bytes(os.path.join(folder, SUMS_FILE)).decode().splitlines()
    digests = {line[66:]: line[:64] for line in lines}  # two spaces, or one and a * for binary
    unlisted = {"config.json", WEIGHTS_FILE} - digests.keys()
    if unlisted:
        raise WeightsError(f"{folder}/{SUMS_FILE} does not list {', '.join(sorted(unlisted))}")
    for name, digest in digests.items():
        path = os.path.join(folder, os.path.basename(name))
        if not os.path.exists(path) or _digest(path) != digest:
            raise WeightsError(f"{path} is not what was staged: its SHA-256 is not {digest}")


def _digest(path: str) -> str:
    return storage.sha256(storage.read_bytes(path))
