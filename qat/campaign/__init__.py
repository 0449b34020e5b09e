"""Plans of many trainings, and the engine that runs them."""
