"""Writing bundles: beside their place, then moved there, so that nobody finds half of one."""

from collections.abc import Mapping

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from bt_core import storage
from bt_core.models.bundle import (
    EXPORTS,
    INDEX_FILE,
    INT8_EXPORTS,
    Bundle,
    BundleInfo,
    index_key,
)


def write_bundle(
    location: str,
    info: BundleInfo,
    state_dicts: dict[str, dict[str, torch.Tensor]],
    training_digests: list[str],
    model_card: str,
    arrays: Mapping[str, dict[str, np.ndarray]] | None = None,
) -> BundleInfo:
    """Write a bundle beside its place, then move it there.

    Args:
        location: a free folder name.
        info: everything but `files` and `bundle_id`, which are filled in.
        state_dicts: weights by member name.
        training_digests: pixel digests of all scans that trained or chose any member.
        model_card: Markdown.
        arrays: of `COPIES_FILE` and `FAR_FILE`, as far as known.

    Returns:
        The complete info.
    """
    keys = np.array(sorted({index_key(d) for d in training_digests}), np.int64)
    files: dict[str, bytes] = {
        INDEX_FILE: safetensors.numpy.save({"keys": keys}),
        **{path: safetensors.numpy.save(own) for path, own in (arrays or {}).items()},
    }
    for member in info.members:
        tensors = {k: v.detach().cpu().contiguous() for k, v in state_dicts[member.name].items()}
        config = member.model_dump(mode="json", include={"model", "preprocess", "golden_digest"})
        files[f"members/{member.name}/model.safetensors"] = safetensors.torch.save(tensors)
        files[f"members/{member.name}/config.json"] = storage.dumps_json(config)
    return _write(location, info, files, model_card)


def rewrite_bundle(
    location: str,
    bundle: Bundle,
    info: BundleInfo,
    exports: Mapping[str, bytes],
    model_card: str,
) -> BundleInfo:
    """Write a bundle with the weights of another one and exports of its own.

    Args:
        location: a free folder name.
        bundle: gives the weights, configs and training index; its exports stay behind.
        info: as for `write_bundle`, of the same members.
        exports: content by path inside the bundle.
        model_card: Markdown.

    Returns:
        The complete info.
    """
    kept = [path for path in bundle.info.files if not path.endswith(EXPORTS + INT8_EXPORTS)]
    files = {**{path: bundle.read(path) for path in kept}, **exports}
    return _write(location, info, files, model_card)


def _write(
    location: str, info: BundleInfo, files: Mapping[str, bytes], model_card: str
) -> BundleInfo:
    info = info.model_copy(update={"files": {p: storage.sha256(c) for p, c in files.items()}})
    info = info.model_copy(update={"bundle_id": info.digest()})
    beside = f"{storage.absolute(location)}.tmp"
    storage.remove_dir(beside)
    for path, content in files.items():
        storage.write_bytes(storage.join(beside, path), content)
    write_card(beside, model_card)
    storage.write_json(storage.join(beside, "bundle.json"), info.model_dump(mode="json"))
    storage.move_dir(beside, storage.absolute(location))
    return info


def write_card(location: str, model_card: str) -> None:
    """Write a bundle's model card, in place of one that is there."""
    storage.write_bytes(storage.join(location, "MODEL_CARD.md"), model_card.encode())
