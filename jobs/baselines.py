"""The plain loops that a user would write; `bt bench` measures against them.

They share the model, the weights, the preprocessing function and the augmentation with the project,
so that only the way of running differs. They know nothing of Ray, and stop at the first damaged
file.
"""

import io
import time
import zipfile
from collections.abc import Callable

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bt_core.ensemble.calibration import Calibration
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.formats import decode_scan
from bt_core.scans.preprocess import PreprocessSpec, preprocess_pixels
from bt_core.training.augment import augment
from bt_core.training.recipe import Recipe
from bt_core.training.stages import build_optimizer, build_schedule


def plain_train(
    model: Classifier,
    recipe: Recipe,
    preprocessor: Preprocessor,
    pixels_NSS: np.ndarray,
    labels_N: np.ndarray,
    epochs: int,
) -> list[float]:
    """Train with a DataLoader over arrays in memory; return images per second of each epoch."""
    loader = DataLoader(
        TensorDataset(torch.from_numpy(pixels_NSS), torch.from_numpy(labels_N)),
        batch_size=recipe.train.batch_size,
        shuffle=True,
        drop_last=True,
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=recipe.train.label_smoothing)
    optimizer = build_optimizer(model, recipe.train)
    scheduler = build_schedule(optimizer, recipe.train, len(loader) * epochs)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    rates = []
    for _ in range(epochs):
        model.train()
        started, num_images = time.perf_counter(), 0
        for pixels_BSS, labels_B in loader:
            unit_B1SS = augment(preprocessor.to_unit(pixels_BSS), recipe.augment, generator)
            loss = loss_fn(model(preprocessor.normalize(unit_B1SS)), labels_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            num_images += len(labels_B)
        rates.append(num_images / (time.perf_counter() - started))
    return rates


def plain_decode(path: str) -> int:
    """Read and decode every member of a zip as grey, one after another; return how many."""
    cv2.setNumThreads(1)
    num_scans = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = np.frombuffer(archive.read(name), np.uint8)
            image_HW = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)
            num_scans += image_HW is not None
    return num_scans


class _ZipScans(Dataset[torch.Tensor]):
    def __init__(self, path: str, names: list[str], spec: PreprocessSpec) -> None:
        self._path, self._names, self._spec = path, names, spec
        self._archive: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._archive is None:  # opened in each worker: a file handle cannot be shared
            self._archive = zipfile.ZipFile(self._path)
        name = self._names[index]
        scan = decode_scan(self._archive.read(name), name)
        return torch.from_numpy(preprocess_pixels(scan.image_HW, self._spec))


def plain_probs(
    models: list[tuple[Classifier, Preprocessor]], calibration: Calibration
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from pixels_BSS uint8 to the probs_BK of eager models in float32."""
    plain = [(model.to(memory_format=torch.contiguous_format), own) for model, own in models]

    def to_probs(pixels_BSS: np.ndarray) -> np.ndarray:
        logits = [model(own.batch(pixels_BSS).contiguous()).numpy() for model, own in plain]
        return calibration.probs(np.stack(logits))

    return to_probs


def plain_score(
    path: str,
    names: list[str],
    spec: PreprocessSpec,
    to_probs: Callable[[np.ndarray], np.ndarray],
    class_names: tuple[str, ...],
    output: str,
    num_workers: int,
) -> int:
    """Score zip members with a DataLoader, write one Parquet file, return its number of rows.

    Args:
        path: zip archive.
        names: its members; none may be damaged.
        spec: preprocessing.
        to_probs: maps pixels_BSS uint8 to probs_BK.
        class_names: K names.
        output: Parquet file.
        num_workers: of the DataLoader; 0 decodes in this process.
    """
    loader = DataLoader(_ZipScans(path, names, spec), batch_size=64, num_workers=num_workers)
    with torch.inference_mode():
        probs_NK = np.concatenate([to_probs(pixels_BSS.numpy()) for pixels_BSS in loader])
    columns = {f"prob_{name}": probs_NK[:, k] for k, name in enumerate(class_names)}
    sink = io.BytesIO()
    pq.write_table(pa.table({"member": names, **columns}), sink, compression="zstd")
    with open(output, "wb") as file:
        file.write(sink.getvalue())
    return len(probs_NK)
