"""Hamilton convolution and transposed convolution."""
