"""Hamilton product with a matrix of quaternions."""
