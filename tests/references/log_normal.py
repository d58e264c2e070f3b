"""Truncated log-normal gates by adaptive quadrature, written from the definitions.

Every quantity is an integral of the unnormalised density of l = log θ over [a, b]; mpmath carries
40 digits, so that neither tail underflows and no closed form is needed.
"""

from __future__ import annotations

import mpmath as mp  # type: ignore[import-untyped]

A, B = -20, 0


def _integral(function, mu, sigma, lower=A, upper=B):
    # A grid finds bells that this function is not told of, the product of two for one.
    marks = {mp.mpf(lower), mp.mpf(upper), *(mp.mpf(mark) for mark in range(A, B))}
    marks = {mark for mark in marks if lower <= mark <= upper}
    for steps in (-40, -12, -6, -3, -1, 0, 1, 3, 6, 12, 40):
        for centre in (mu, mu + sigma**2, mu + 2 * sigma**2):
            mark = centre + steps * sigma
            if lower < mark < upper:
                marks.add(mark)
    for edge, sign in ((lower, 1), (upper, -1)):
        # Where the bell lies outside the bounds, the mass sits within σ²/distance of an edge.
        width = sigma**2 / max(abs(edge - mu), sigma)
        for steps in (0.1, 1, 5, 20):
            mark = edge + sign * steps * width
            if lower < mark < upper:
                marks.add(mark)
    return mp.quad(function, sorted(marks))


class QuadratureGate:
    """One gate; every property is an integral."""

    def __init__(self, mu: float, sigma: float) -> None:
        mp.mp.dps = 40
        self.mu, self.sigma = mp.mpf(mu), mp.mpf(sigma)
        self.mass = self._over(lambda value: mp.mpf(1))

    def _bell(self, value):
        return mp.exp(-(((value - self.mu) / self.sigma) ** 2) / 2)

    def _over(self, function, lower=A, upper=B):
        return _integral(
            lambda value: self._bell(value) * function(value), self.mu, self.sigma, lower, upper
        )

    def kl(self) -> float:
        """E_q[log q − log p]."""
        log_ratio = self._over(lambda v: -(((v - self.mu) / self.sigma) ** 2) / 2) / self.mass
        return float(log_ratio - mp.log(self.mass) + mp.log(B - A))

    def moment(self, order: int):
        """E_q[θ^order]."""
        return self._over(lambda value: mp.exp(order * value)) / self.mass

    def snr(self) -> float:
        """Mean over standard deviation."""
        mean = self.moment(1)
        return float(mean / mp.sqrt(self.moment(2) - mean**2))

    def delta_f_normal(self, sigma_p: float = 1e-6, mu_p: float = A) -> float:
        """log ∫ q p̃/p, with the spike p̃ normalised over the same bounds."""
        width, centre = mp.mpf(sigma_p), mp.mpf(mu_p)

        def spike(value):
            return mp.exp(-(((value - centre) / width) ** 2) / 2)

        joint = _integral(lambda v: spike(v) * self._bell(v), centre, width)
        spike_mass = _integral(spike, centre, width)
        return float(mp.log(joint / spike_mass / self.mass * (B - A)))

    def delta_f_uniform(self, p1: float, p2: float | None = 23) -> float:
        """log ∫ q p̃/p over the reduced bounds."""
        lower = mp.mpf(A) if p2 is None else -p2 * mp.log(2)
        upper = -p1 * mp.log(2)
        inside = self._over(lambda value: mp.mpf(1), lower, upper) / self.mass
        return float(mp.log(inside * (B - A) / (upper - lower)))
