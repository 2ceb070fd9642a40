"""The library: pixels, datasets, classifiers, training, ensembles, inference, evaluation."""

__version__ = "0.1.0"
