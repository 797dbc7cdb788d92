"""The coefficients of the polynomials in csrc/cpu/vec_exp.h and csrc/dense/cpu/activation.h, lowest power first.

Each is the polynomial whose largest weighted error is least (Lawson's algorithm: least squares, reweighted by the
errors), rounded to fp32.
"""

from __future__ import annotations

import numpy as np
import torch


def nodes(low: float, high: float, count: int = 3000) -> np.ndarray:
    """Chebyshev's nodes, at which a polynomial shows its largest errors."""
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(count) + 0.5) / count)


def fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, powers: range) -> tuple[np.ndarray, float]:
    """The coefficients of the ``powers`` of x, and the largest ``weight * |y - polynomial|``."""
    scale = np.abs(x).max()
    basis = np.stack([(x / scale) ** power for power in powers], axis=1)
    shares = np.full_like(x, 1 / len(x))
    for _ in range(1500):
        rows = np.sqrt(shares) * weight
        found, *_ = np.linalg.lstsq(basis * rows[:, None], y * rows, rcond=None)
        errors = np.abs(weight * (y - basis @ found))
        shares *= errors
        shares /= shares.sum()
    return (found / scale ** np.array(powers)).astype(np.float32), float(errors.max())


def exponential() -> tuple[np.ndarray, float]:
    """p of ``e^r = 1 + r + r^2 p(r)`` for ``|r| <= ln2 / 2``; the weight makes it the relative error of ``e^r``."""
    r = nodes(-0.3466, 0.3466)
    r = r[np.abs(r) > 1e-3]
    return fit(r, (np.expm1(r) - r) / r**2, r**2 / np.exp(r), range(5))


def log_erfcx() -> tuple[np.ndarray, float]:
    """``log(erfc(t) e^(t^2))`` up to 4.25, where the weight lets the relative error of erfc grow as erfc vanishes."""
    t = torch.from_numpy(nodes(0.0, 4.25))
    erfc = torch.special.erfc(t)
    weight = erfc / erfc.clamp_min(3e-4)
    return fit(t.numpy(), torch.special.erfcx(t).log().numpy(), weight.numpy(), range(1, 11))


if __name__ == "__main__":
    for name, (coefficients, error) in {"exp": exponential(), "log erfcx": log_erfcx()}.items():
        print(f"{name}, error {error:.1e}: " + " ".join(f"{value:.9g}" for value in coefficients))
