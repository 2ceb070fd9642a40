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
"""Different scans below which there is no map."""


def with_embedding(predictions: pa.Table, seed: int = 0) -> pa.Table:
    """Return a predictions table with `tsne_x` and `tsne_y` in place of `features`.

    Scans without features, and those over the number that is mapped, have none; nor has any where
    features are not finite or all but equal, which makes no map.
    """
    rows = np.flatnonzero(predictions["features"].is_valid().to_numpy())
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:_MOST])
    places_N2 = np.full((predictions.num_rows, 2), np.nan)
    if len(chosen):
        lists = predictions["features"].take(pa.array(chosen)).combine_chunks()
        features_ND = lists.flatten().to_numpy().reshape(len(chosen), -1)
        if np.isfinite(features_ND).all() and len(np.unique(features_ND, axis=0)) >= _FEWEST:
            places_N2[chosen] = embed(features_ND, seed)
    table = predictions.drop_columns(["features"])
    for name, place_N in zip(COLUMNS, places_N2.T, strict=True):
        table = table.append_column(name, pa.array(place_N, pa.float64(), from_pandas=True))
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
