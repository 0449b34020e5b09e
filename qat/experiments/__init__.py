"""What is made from many trainings: the demo, statistics and reports."""
