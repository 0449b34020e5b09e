"""Training: from an experiment's settings to a finished run folder, and what a trained classifier predicts."""
