"""Measurements behind the choices of the library and the claims of its README."""
