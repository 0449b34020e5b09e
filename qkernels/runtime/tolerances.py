"""Maximum errors of results against float64 of the stored operands, for checks, tests and benchmarks."""

# Relative Frobenius error, by precision and by whether operands of a half type have a float32 result: one rounding.
TOLERANCES = {
    ("bf16", False): 2.1e-3,
    ("bf16", True): 2e-6,
    ("fp16", False): 4e-4,
    ("fp16", True): 2e-6,
    ("tf32", False): 4e-4,
    ("float32", False): 2e-6,
}
# Gradients of weight and bias sum up to 2**16 pixels in float32. Each addition rounds by 2**-24 of the partial sum,
# which for n terms of equal sign adds up to 0.58 * 2**-24 * sqrt(n / 3): 5e-6.
LONG_SUM_TOLERANCE = 1e-5
# max |error| / (RMS + |exact|) in units of the Frobenius figure.
LARGEST_ERROR = 6

# Errors of the anti-transfer losses and of their gradients. Gram matrices after a ReLU are alike: a gradient is the
# difference of two terms up to ten times as large.
LOSS_TOLERANCES = {"bf16": (1e-5, 2.1e-3), "fp16": (1e-5, 4e-4), "float32": (1e-5, 1e-4)}


def tolerance(result: str, precision: str, widened: bool = False) -> float:
    """Maximum relative Frobenius error of a result "y", "dx", "dw" or "db".

    >>> tolerance("y", "bf16"), tolerance("dw", "float32")
    (0.0021, 1e-05)
    """
    allowed = TOLERANCES[precision, widened]
    return max(allowed, LONG_SUM_TOLERANCE) if result in ("dw", "db") else allowed
