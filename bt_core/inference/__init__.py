"""From pixels to probabilities: the predictor is the only way there."""
