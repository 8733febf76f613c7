"""Checks of arguments: canonical axes, and all errors of shape, dtype, range and mode.

Each message says what was called, what it got, what it expected and what to do. The decorator of a
public function, `named`, adds the name of what was called.
"""

# ruff: noqa: F401, I001

from normjax._errors.arrays import (
    Features, affine, axes, axis, broadcast, common_shape, feature_vector, features,
    group_axes, inexact, mask, matrix, nonempty, nonzero, number_of_groups, same_shape_and_dtype,
    scalar, shape, window,
)  # fmt: skip
from normjax._errors.devices import axis_size, grouped, groups
from normjax._errors.naming import keywords, named
from normjax._errors.dtypes import floating_dtype, output_dtype
from normjax._errors.modules import (
    feature_count, groups_of_features, has_count, mode_of, moments_to_share, num_features,
    of_weight, random_streams, restored, some_batch_norm, some_moments,
)  # fmt: skip
from normjax._errors.options import (
    Mode, activation, at_least_one, bound, ddof, entries, epsilon, finite, initializer, known,
    layer, mode, momentum, moves, only_matrix, positive, slope, steps, switch, text,
    variable_names, virtual_batches,
)  # fmt: skip
from normjax._errors.state import (
    batch_stats, collection, count, moments, running_layer, same_shape, some_layer, stored_count,
)  # fmt: skip
