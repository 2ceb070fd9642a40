"""A tiny training without Ray: scans, a recipe, and a `TrainContext` in memory."""

import io

import numpy as np
import torch

from bt_core.models.classifier import build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.training.engine import fit
from bt_core.training.recipe import Recipe
from bt_core.training.spec import AugmentSpec, TrainSpec

SIDE = 32


def toy_scans(num, seed=0):
    """Class 0 is bright on the left, class 1 at the top: a mirror image keeps neither apart."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (num, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(num) % 2
    pixels[labels == 0, :, : SIDE // 3] += 150
    pixels[labels == 1, : SIDE // 3, :] += 150
    return {
        "scan_id": np.array([f"{i:04d}" for i in range(num)]),
        "pixels": pixels,
        "label": labels,
    }


class AloneContext:
    """`TrainContext` for one process, with checkpoints in memory."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, stop_after=(), batch_size=16):
        self.train, self.validation = toy_scans(64), toy_scans(30, seed=1)
        self.stored, self.metrics, self.predictions = None, [], None
        self.stop_after, self.batch_size = set(stop_after), batch_size

    def train_batches(self, epoch):
        order = np.random.default_rng(epoch).permutation(64)
        for i in range(0, 64, self.batch_size):
            yield {k: v[order[i : i + self.batch_size]] for k, v in self.train.items()}

    def validation_batches(self):
        yield {k: v[:20] for k, v in self.validation.items()}
        yield {k: v[20:] for k, v in self.validation.items()}

    def wrap(self, model):
        return model

    def gather(self, own):
        return own

    def sync(self, model):
        self.synced = True

    def mean(self, value):
        return value

    def write_history(self, history):
        self.written = len(history)

    def restore(self):
        if self.stored is None:
            return None
        return torch.load(io.BytesIO(self.stored), weights_only=True)

    def report(self, metrics, state, predictions):
        self.metrics.append(metrics)
        file = io.BytesIO()
        torch.save(state, file)
        self.stored = file.getvalue()
        self.predictions = predictions
        if metrics["epoch"] in self.stop_after:
            self.stop_after.remove(metrics["epoch"])
            raise KeyboardInterrupt


def toy_recipe(augment=None, **train):
    return Recipe(
        name="toy",
        task="binary",
        preprocess=PreprocessSpec(size_px=SIDE),
        augment=augment or AugmentSpec(horizontal_flip=False, rotation_degrees=5),
        model=ModelSpec(backbone="cnn_small", backbone_args={"width": 4}, weights="none"),
        train=TrainSpec(**{"epochs": 4, "batch_size": 16, "learning_rate": 0.01, **train}),
    )


def run(context, recipe):
    torch.manual_seed(0)
    model, _, preprocess = build_classifier(recipe.model, recipe.preprocess, 2)
    fit(context, model, recipe, Preprocessor(preprocess), [32, 32])
    return model
