"""Classifiers: backbones, heads, initial weights, bundles."""
