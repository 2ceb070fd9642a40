"""Features of scans as a map in two dimensions. Shape suffixes: N scans, D features."""

from typing import Final

import numpy as np
import pyarrow as pa
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

COLUMNS: Final = ("tsne_x", "tsne_y")
_MOST: Final = 2_000
"""Scans that are mapped, by chance if there are more."""
_PERPLEXITY: Final = 30.0
_FEWEST: Final = 10


def with_embedding(predictions: pa.Table, seed: int = 0) -> pa.Table:
    """Return a predictions table with `tsne_x` and `tsne_y` in place of `features`.

    Scans without features, and those over the number that is mapped, have none.
    """
    rows = [i for i, f in enumerate(predictions["features"].to_pylist()) if f is not None]
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:_MOST])
    places: list[list[float] | None] = [None] * predictions.num_rows
    if len(chosen) >= _FEWEST:
        features_ND = np.array(predictions["features"].take(pa.array(chosen)).to_pylist())
        for i, place in zip(chosen, embed(features_ND, seed), strict=True):
            places[i] = place.tolist()
    table = predictions.drop_columns(["features"])
    for axis, name in enumerate(COLUMNS):
        values = [None if place is None else place[axis] for place in places]
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def embed(features_ND: np.ndarray, seed: int) -> np.ndarray:
    """Return places_N2 by t-SNE (van der Maaten & Hinton 2008) of the first principal parts.

    Distances between far groups, and their sizes, mean nothing.
    """
    width = min(50, *features_ND.shape)
    reduced = PCA(width, random_state=seed).fit_transform(features_ND)
    perplexity = min(_PERPLEXITY, (len(features_ND) - 1) / 3)
    places_N2: np.ndarray = TSNE(perplexity=perplexity, random_state=seed).fit_transform(reduced)
    return places_N2
