"""Training speech emotion recognition with quaternion networks and anti-transfer learning (WASPAA 2023)."""

__version__ = "0.1.0"
