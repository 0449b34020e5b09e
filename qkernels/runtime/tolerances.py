"""How far a result may be from float64 of the operands as stored: the design's table, for checks, tests and timings."""

# Relative Frobenius error, by precision and whether the result is float32 though the operands are not: one rounding.
TOLERANCES = {
    ("bf16", False): 2.1e-3,
    ("bf16", True): 2e-6,
    ("fp16", False): 4e-4,
    ("fp16", True): 2e-6,
    ("tf32", False): 4e-4,
    ("float32", False): 2e-6,
}
# Gradients of weight and bias sum up to 2**16 pixels in float32. Each addition rounds by 2**-24 of the sum so far,
# which for n terms of one sign adds up to 0.58 * 2**-24 * sqrt(n / 3): 5e-6.
LONG_SUM_TOLERANCE = 1e-5
# max |error| / (RMS + |exact|) in units of the Frobenius figure.
LARGEST_ERROR = 6

# Of the anti-transfer losses and of their gradients. Gram matrices behind a ReLU are alike: a gradient is the
# difference of two terms up to ten times as large.
LOSS_TOLERANCES = {"bf16": (1e-5, 2.1e-3), "fp16": (1e-5, 4e-4), "float32": (1e-5, 1e-4)}


def tolerance(result: str, precision: str, widened: bool = False) -> float:
    """The relative Frobenius error allowed to one of the results y, dx, dw, db.

    >>> tolerance("y", "bf16"), tolerance("dw", "float32")
    (0.0021, 1e-05)
    """
    allowed = TOLERANCES[precision, widened]
    return max(allowed, LONG_SUM_TOLERANCE) if result in ("dw", "db") else allowed
