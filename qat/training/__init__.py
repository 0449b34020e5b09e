"""The training loop and what it needs: examples, objectives, metrics, checkpoints, processes."""
