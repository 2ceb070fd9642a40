"""Training: recipe, augmentation, engine (plain torch), worker and launch (Ray Train)."""
