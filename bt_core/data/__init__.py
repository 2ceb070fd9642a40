"""Scans become a dataset: decode stage, catalog, splits, Ray Data pipelines."""
