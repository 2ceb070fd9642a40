"""Metrics, plots, report, model card: everything from tables, nothing that needs a model."""
