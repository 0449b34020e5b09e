"""How far a result may be from float64 of the operands as stored: the design's table, for checks, tests and timings."""

# Relative Frobenius error, by precision and whether the result is float32 though the operands are not: for forms of 16
# products, and for q8, which rounds sums of components.
TOLERANCES = {
    ("bf16", False): (2.1e-3, 4.5e-3),
    ("bf16", True): (2e-6, 3.2e-3),
    ("fp16", False): (4e-4, 6e-4),
    ("fp16", True): (2e-6, 3.5e-4),
    ("tf32", False): (4e-4, 6e-4),
    ("float32", False): (2e-6, 2e-6),
}
# Gradients of weight and bias sum up to 2**16 pixels in float32. Each addition rounds by 2**-24 of the sum so far,
# which for n terms of one sign adds up to 0.58 * 2**-24 * sqrt(n / 3): 5e-6.
LONG_SUM_TOLERANCE = 1e-5
# max |error| / (RMS + |exact|) in units of the Frobenius figure.
LARGEST_ERROR = 6

# Of the anti-transfer losses and of their gradients. Gram matrices behind a ReLU are alike: a gradient is the
# difference of two terms up to ten times as large.
LOSS_TOLERANCES = {"bf16": (1e-5, 2.1e-3), "fp16": (1e-5, 4e-4), "float32": (1e-5, 1e-4)}


def tolerance(result: str, precision: str, form: str, widened: bool = False) -> float:
    """The relative Frobenius error allowed to one of the results y, dx, dw, db, computed by `form`.

    >>> tolerance("y", "bf16", "signed"), tolerance("dw", "float32", "q8")
    (0.0021, 1e-05)
    """
    allowed = TOLERANCES[precision, widened][form == "q8"]
    return max(allowed, LONG_SUM_TOLERANCE) if result in ("dw", "db") else allowed
