"""Exact first and second derivatives in NumPy float64. Imports no JAX and nothing of normjax.

A hyper-dual number a + b s + c t + d st with s^2 = t^2 = 0 carries the derivative along s, that
along t, and the mixed one through any formula without a step size and so without cancellation
(Fike, Alonso 2011, The Development of Hyper-Dual Numbers for Exact Second-Derivative
Calculations). One evaluation with s along every input and t along one direction gives the value,
the Jacobian, the JVP and the Hessian-vector product.

With a `rounding` every operation has a random relative error of eps, in any number of rows. The
change of the result estimates the error of arithmetic with that eps (Parker 1997, Monte Carlo
Arithmetic), so tests can derive a bound for each input.
"""

import numpy as np


class HyperDual:
    """Arrays a, b, c and d that broadcast against each other; axes are counted from the end."""

    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def __init__(self, a, b=0.0, c=0.0, d=0.0, rounding=None):
        self.parts = tuple(np.asarray(v, np.float64) for v in (a, b, c, d))
        self.rounding = rounding

    @property
    def value(self):
        return self.parts[0]

    def moved(self, function):
        """Applies `function` to each part, without rounding."""
        return HyperDual(*map(function, self.parts), self.rounding)

    def made(self, other, *parts):
        """The result of an operation with `other`, rounded if one of the two is."""
        rounding = self.rounding or other.rounding
        return HyperDual(*(map(rounding, parts) if rounding else parts), rounding)

    def narrowed(self, factor):
        """The same with derivatives rounded to a dtype whose eps is `factor` times as large."""
        if not self.rounding:
            return self
        value, *rest = self.parts
        rest = (v + factor * (self.rounding(v) - v) for v in rest)
        return HyperDual(value, *rest, self.rounding)

    def smooth(self, value, slope, curvature):
        """A function of this number from its value and two derivatives at it."""
        _, b, c, d = self.parts
        return self.made(self, value, slope * b, slope * c, slope * d + curvature * b * c)

    def __add__(self, other):
        other = as_dual(other)
        pairs = zip(self.parts, other.parts, strict=True)
        return self.made(other, *(u + v for u, v in pairs))

    def __mul__(self, other):
        other = as_dual(other)
        a, b, c, d = self.parts
        e, f, g, h = other.parts
        parts = a * e, a * f + b * e, a * g + c * e, a * h + b * g + c * f + d * e
        return self.made(other, *parts)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return self.moved(np.negative)

    def __sub__(self, other):
        return self + -as_dual(other)

    def __rsub__(self, other):
        return -self + other

    def __pow__(self, p):
        a = self.value
        return self.smooth(a**p, p * a ** (p - 1), p * (p - 1) * a ** (p - 2))

    def __truediv__(self, other):
        return self * (as_dual(other) ** -1)

    def expm1(self):
        # The slope is taken from the value, as libraries do: off by eps of 1 where it vanishes.
        y = np.expm1(self.value)
        one = self.rounding(np.ones_like(y)) if self.rounding else 1.0
        return self.smooth(y, y + one, y + one)

    def tanh(self):
        y = np.tanh(self.value)
        y = self.rounding(y) if self.rounding else y
        return self.smooth(y, 1 - y * y, -2 * y * (1 - y * y))

    def sum(self, axes):
        terms = self.made(self, *self.parts)
        return terms.moved(lambda v: v.sum(axes, keepdims=True))

    def __matmul__(self, matrix):
        terms = self.made(self, *self.parts)
        return terms.moved(lambda v: v @ matrix)

    def spread(self, shape):
        """Broadcast to the trailing axes `shape`."""
        rank = len(shape)
        return self.moved(lambda v: np.broadcast_to(v, (*v.shape[:-rank], *shape)))


def as_dual(value):
    return value if isinstance(value, HyperDual) else HyperDual(value)


def where(condition, yes, no):
    """np.where with a constant condition; entries not selected have no effect, NaN included."""
    yes, no = as_dual(yes), as_dual(no)
    parts = (np.where(condition, u, v) for u, v in zip(yes.parts, no.parts, strict=True))
    return HyperDual(*parts, yes.rounding or no.rounding)


def standardized(
    x, scale=1.0, bias=0.0, *, axes, mask=None, epsilon, centered=True, pool=None, times=1
):
    """(x - mean) / sqrt(times var + epsilon) * scale + bias over negative axes; also the moments.

    `pool` merges features: a matrix of zeros and ones that sums the features of each group.
    """
    valid = np.ones(1, bool) if mask is None else mask
    valid = np.broadcast_to(valid, x.value.shape)
    x = where(valid | np.isfinite(x.value), x, 0.0)

    def total(v):
        v = v.sum(axes) if isinstance(v, HyperDual) else v.sum(axes, keepdims=True)
        return v if pool is None else v @ pool

    n = np.maximum(total(valid.astype(float)), 1)
    mean = total(where(valid, x, 0.0)) * (1 / n) * float(centered)
    deviation = x - mean
    # The deviations sum to zero, so a constant in place of the second mean changes nothing. But a
    # rounding error of the mean then shows in the derivatives, as in formulas without d mean.
    squares = deviation * (x - mean.value)
    var = total(where(valid, squares, 0.0)) * (1 / n)
    if x.rounding:
        # The relative error of a stable variance grows with |mean| / deviation.
        condition = 1 + abs(mean.value) / np.sqrt(var.value + epsilon)
        var = var * (1 + x.rounding(condition) - condition)
    spread = var * (n if times == "n" else times)
    return deviation * (spread + epsilon) ** -0.5 * scale + bias, mean, var


def windows(features, size):
    """The features that local response norm sums for each feature, as in PyTorch."""
    i = np.arange(features)
    reach = i[:, None] - i[None, :]
    return ((-(size // 2) <= reach) & (reach <= (size - 1) // 2)).astype(float)


def blocks(features, groups):
    return np.kron(np.eye(groups), np.ones((features // groups, features // groups)))
