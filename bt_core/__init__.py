"""The library: pixels, datasets, classifiers, training, ensembles, inference, evaluation."""

__version__ = "0.2.0"
