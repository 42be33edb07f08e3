"""Measures of how far apart two passes are, gathered a piece at a time."""

import math

import torch
from torch import Tensor

from t5g2convert.parity.reports.report import Drift, Figures

BLOCK_TOKENS = 256
"""Number of tokens with logits in float64 at once."""


class Difference:
    """The largest difference of all pieces so far; infinite where a value is not finite.

    `expected_finite` is False once an expected value was not finite; the difference then says nothing about the target.
    """

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.expected_finite = True
        self.peak = 0.0
        self.compared = 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Compare two tensors of one shape."""
        if expected.shape != found.shape:
            raise ValueError(f"shapes differ: {tuple(expected.shape)} and {tuple(found.shape)}")
        if not expected.numel():
            return
        self.compared += expected.numel()
        self.peak = max(self.peak, float(expected.abs().max()))
        distance = 0.0 if torch.equal(expected, found) else float((expected.float() - found.float()).abs().max())
        self.expected_finite &= (given := bool(torch.isfinite(expected).all()))
        finite = given and bool(torch.isfinite(found).all())
        self.max_abs = max(self.max_abs, distance if finite else math.inf)

    def __str__(self) -> str:
        if not math.isfinite(self.max_abs):
            return "values that are not finite"
        if not self.max_abs:
            return "difference 0"
        return f"difference {self.max_abs:.3g} ({self.relative:.2g} of the largest value)"

    @property
    def relative(self) -> float:
        """Largest difference over the largest expected value."""
        return self.max_abs / self.peak if self.peak and math.isfinite(self.max_abs) else self.max_abs

    def within(self, tolerance: float) -> bool:
        """Return whether something was compared and no difference exceeds `tolerance` times the largest value."""
        return self.compared > 0 and math.isfinite(self.max_abs) and self.max_abs <= tolerance * self.peak

    def drift(self, layer: str) -> Drift:
        """Return the difference after a layer."""
        return Drift(layer, self.max_abs, self.relative)

    def figures(
        self,
        *,
        departs: str | None,
        drifts: tuple[Drift, ...],
        kl: float | None = None,
        agreement: float | None = None,
    ) -> Figures:
        """Return the difference together with the other measurements of a check."""
        return Figures(self.max_abs, self.relative, self.compared, kl, agreement, departs, drifts)


class Distributions:
    """Compares two distributions over the vocabulary for every token, a slice of the vocabulary at a time.

    With p and q the softmaxes of the logits a and b, KL(p || q) = sum p (a - b) - log Z_a + log Z_b; all three sums are
    kept relative to the largest logit so far and scaled down when a larger one comes. Sums are float64.

    Args:
        tokens: Number of tokens.
        labels_N: The tokens that follow in the text, for perplexities.
    """

    def __init__(self, tokens: int, labels_N: Tensor | None = None) -> None:
        self._a, self._b = _LogSum(tokens), _LogSum(tokens)
        self._difference_N = torch.zeros(tokens, dtype=torch.float64)
        self._labels_N = None if labels_N is None else labels_N.cpu()
        self._label_logits_2N = torch.full((2, tokens), math.nan, dtype=torch.float64)

    def add(self, start: int, a_NV: Tensor, b_NV: Tensor) -> None:
        """Add the logits of a slice of the vocabulary, which begins at row `start`."""
        for first in range(0, a_NV.shape[0], BLOCK_TOKENS):
            at = slice(first, first + BLOCK_TOKENS)
            a, b = a_NV[at].double().cpu(), b_NV[at].double().cpu()
            shrink, weights = self._a.add(at, start, a)
            self._b.add(at, start, b)
            self._difference_N[at] = self._difference_N[at] * shrink + (weights * (a - b)).sum(-1)
            if self._labels_N is not None:
                labels = self._labels_N[at] - start
                here = ((labels >= 0) & (labels < a.shape[1])).nonzero()[:, 0]
                for row, logits in enumerate((a, b)):
                    self._label_logits_2N[row, here + first] = logits[here, labels[here]]

    @property
    def kl_of_each(self) -> Tensor:
        """KL(p || q) of each token, in nats."""
        return self._difference_N / self._a.sum_N - self._a.log + self._b.log

    @property
    def kl(self) -> float:
        """The mean of KL(p || q) over tokens, in nats."""
        return float(self.kl_of_each.mean())

    @property
    def agreement(self) -> float:
        """Share of tokens with the same most probable successor."""
        return float((self._a.best_N == self._b.best_N).double().mean())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of the labels under p and under q."""
        a, b = (
            float(torch.exp((side.log - self._label_logits_2N[row]).mean()))
            for row, side in enumerate((self._a, self._b))
        )
        return a, b


class _LogSum:
    """The sum of exponentials of logits relative to the largest so far, and the index of the largest."""

    def __init__(self, tokens: int) -> None:
        self.top_N = torch.full((tokens,), -math.inf, dtype=torch.float64)
        self.sum_N = torch.zeros(tokens, dtype=torch.float64)
        self.best_N = torch.zeros(tokens, dtype=torch.int64)

    @property
    def log(self) -> Tensor:
        """Logarithm of the sum of exponentials."""
        return self.top_N + self.sum_N.log()

    def add(self, at: slice, start: int, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Add logits; return the factor that scales older sums down, [n], and the new exponentials, [n, v]."""
        peak, where = logits_NV.max(-1)
        self.best_N[at] = torch.where(peak > self.top_N[at], where + start, self.best_N[at])
        top = torch.maximum(self.top_N[at], peak)
        shrink, weights = torch.exp(self.top_N[at] - top), torch.exp(logits_NV - top[:, None])
        self.sum_N[at] = self.sum_N[at] * shrink + weights.sum(-1)
        self.top_N[at] = top
        return shrink, weights
