"""Cosine of the Gram matrices of two feature maps."""
