"""Other servers around the same model, which `bt bench serve` compares with."""
