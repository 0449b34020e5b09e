"""Many trainings from one plan, and the engine that runs them."""
