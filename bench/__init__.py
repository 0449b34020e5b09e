"""Measurements that back the choices of the library and the claims of its README."""
