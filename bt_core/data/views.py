"""Views of a dataset: its pixels under one preprocessing spec, as Parquet shards for training."""

import uuid
from typing import Final

import numpy as np
import pyarrow as pa
import ray
import ray.data

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.decode_guard import MAX_RETRIES
from bt_core.data.decode_stage import Columns, DecodeStage
from bt_core.data.pipeline import bounded_retries, check_rows, configure, decode, lean_reader
from bt_core.data.seal import refuse_test
from bt_core.data.stream import split_streamed
from bt_core.scans.preprocess import PreprocessSpec

_SHARD_ROWS: Final = 512
_CACHED_SHARE: Final = 0.25


def ensure_view(dataset: Dataset, spec: PreprocessSpec) -> str:
    """Return the folder of a dataset's pixel shards for a spec, writing them first if need be.

    A view holds `split=train` and `split=validation`, each with Parquet shards of scan_id, label
    (class index) and pixels (uint8, S x S), in a random order that the dataset's seed decides, so
    that streaming them in order mixes the classes. Test scans are in no view: they are sealed, and
    scored from their source.
    """
    location, is_there = find_view(dataset, spec)
    if is_there:
        return location
    beside = f"{location}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        _write_view(beside, dataset, spec)
    except BaseException:  # an interrupt as well: gigabytes may have been written
        storage.remove_dir(beside)
        raise
    if storage.exists(storage.join(location, "view.json")):  # another command was faster
        storage.remove_dir(beside)
        return location
    storage.remove_dir(location)
    storage.move_dir(beside, location)
    return location


def find_view(dataset: Dataset, spec: PreprocessSpec) -> tuple[str, bool]:
    """Return the folder of a dataset's pixel shards for a spec, and whether it is there."""
    name = f"{spec.size_px}px-{spec.pixel_digest[:8]}"
    location = storage.join(dataset.location, "views", name)
    return location, storage.exists(storage.join(location, "view.json"))


def read_pixels(view: str, split: str, most: int | None = None) -> tuple[list[str], np.ndarray]:
    """Return ids and pixels_NSS uint8 of the first scans of a split; without Ray.

    Args:
        view: its folder.
        split: train or validation.
        most: number of scans, whose order is random; None takes all.

    Raises:
        SealedError: for the test split.
    """
    refuse_test(split, "pixels")
    folder = storage.join(view, f"split={split}")
    side = storage.read_json(storage.join(view, "view.json"))["preprocess"]["size_px"]
    ids: list[str] = []
    parts = [np.zeros((0, side, side), np.uint8)]
    for name in storage.list_files(folder, ".parquet"):
        if most is not None and len(ids) >= most:
            break
        table = storage.read_table(storage.join(folder, name), columns=["scan_id", "pixels"])
        ids += table["scan_id"].to_pylist()
        parts += [np.reshape(p.as_py(), (1, side, side)).astype(np.uint8) for p in table["pixels"]]
    return ids[:most], np.concatenate(parts)[:most]


def _write_view(location: str, dataset: Dataset, spec: PreprocessSpec) -> None:
    catalog = dataset.catalog()
    used = np.flatnonzero(np.array(catalog["split"].to_pylist()) != "")
    order = np.random.default_rng(dataset.info.plan.seed).permutation(used)
    rows = catalog.take(pa.array(order))
    index = [dataset.info.label_space.index(label) for label in rows["label"].to_pylist()]
    refs = rows.select(["scan_id", "uri", "member", "position", "split", "pixel_sha256"])
    refs = refs.rename_columns({"pixel_sha256": "expected"})
    refs = refs.append_column("label", pa.array(index, pa.int64()))
    streamed, _ = split_streamed(refs)
    if streamed:  # these come in the order of their archive, which may go class by class
        refs = refs.append_column("rank", pa.array(range(refs.num_rows), pa.int64()))
    decoded = decode(refs, DecodeStage((spec,)))
    filesystem, path = storage.filesystem(location)
    with bounded_retries():
        views = decoded.map_batches(_view_rows, batch_size=_SHARD_ROWS, max_retries=MAX_RETRIES)
        views = views.sort("rank").drop_columns(["rank"]) if streamed else views
        views.write_parquet(
            path,
            filesystem=filesystem,
            partition_cols=["split"],
            mode="append",
            ray_remote_args={"max_retries": MAX_RETRIES},
        )
    check_rows(refs, storage.read_table(location, columns=["scan_id"]))
    view = {"preprocess": spec.model_dump(), "num_scans": len(order)}
    storage.write_json(storage.join(location, "view.json"), view)


def read_view(view: str, split: str) -> ray.data.Dataset:
    """Return the dataset of one split of a view: scan_id, label, pixels.

    A split that takes less than a quarter of the cluster's object store is read into it once, so
    that an epoch does not begin with starting tasks (12 to 20 s on two busy cores); a larger one is
    streamed from its shards every epoch.

    Raises:
        SealedError: for the test split.
    """
    refuse_test(split, "pixels")
    configure()
    filesystem, folder = storage.filesystem(storage.join(view, f"split={split}"))
    with lean_reader(), bounded_retries():
        shards = ray.data.read_parquet(
            folder,
            filesystem=filesystem,
            partitioning=None,
            ray_remote_args={"max_retries": MAX_RETRIES},
        )
        dataset = shards.select_columns(
            ["scan_id", "label", "pixels"], ray_remote_args={"max_retries": MAX_RETRIES}
        )
    side = storage.read_json(storage.join(view, "view.json"))["preprocess"]["size_px"]
    num_bytes = dataset.count() * side**2
    fits = num_bytes < _CACHED_SHARE * ray.cluster_resources().get("object_store_memory", 0)
    dataset.context.execution_options.preserve_order = True  # a training repeats exactly
    return dataset.materialize() if fits else dataset


def _view_rows(columns: Columns) -> Columns:
    """Keep a view's columns; refuse scans that no longer decode to what the catalog says."""
    changed = columns["pixel_sha256"] != columns["expected"]
    lost = sorted(set(columns["reason"].tolist()) - {""})
    if lost:
        raise ValueError(f"scans of the catalog cannot be read any more: {', '.join(lost)}")
    if changed.any():
        first = columns["scan_id"][changed][0]
        raise ValueError(
            f"{int(changed.sum())} scans differ from the catalog (first: scan {first}): the source "
            "has changed since bt prepare; prepare it again"
        )
    kept: Columns = {k: columns[k] for k in ("scan_id", "label", "split", "rank") if k in columns}
    return {**kept, "pixels": columns["pixels_0"]}
