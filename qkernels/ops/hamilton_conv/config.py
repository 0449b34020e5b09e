"""Which form computes a Hamilton product: a pure function of its shape."""


def cpu_form(p: int, q: int, kernel_area: int = 1, pixels: int = 1) -> str:
    """The fastest plain-PyTorch form on a CPU in float32, forward and backward (bench/results/cpu_forms.csv).

    "q8" halves the p q kernel_area products of a pixel and pays with passes over p + q maps, which cost more the less
    of them fits the caches. The batch is left out, so that its size never changes what is compiled.

    Args:
        p: quaternion channels of the output.
        q: quaternion channels of the input, per group.
        kernel_area: kh kw; 1 for a linear map.
        pixels: H W of the input; 1 for a linear map.

    Returns:
        "dense" or "q8".

    >>> cpu_form(128, 128, 9, 64), cpu_form(16, 16, 9, 4096)
    ('q8', 'dense')
    """
    products_per_map = 80 if pixels <= 64 else 160 if pixels <= 256 else 320
    return "q8" if p * q * kernel_area >= products_per_map * (p + q) else "dense"
