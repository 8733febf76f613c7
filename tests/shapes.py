"""Shapes and feature axes that the tests share, from (N, C) to (N, D, H, W, C)."""

SHAPES = {
    "rows": ((12, 5), -1),
    "single feature": ((9, 1), -1),
    "sequence": ((4, 6, 3), -1),
    "images": ((4, 3, 5, 6), -1),
    "images, features first": ((4, 6, 3, 5), 1),
    "volumes": ((2, 3, 2, 4, 5), -1),
    "two feature axes": ((6, 3, 4), (1, 2)),
    "outer and inner feature axes": ((3, 8, 4), (0, -1)),
    "two rows of one value": ((2, 1), 1),
}


def reduced(shape, feature_axis):
    """The axes that are not features."""
    kept = {
        a % len(shape) for a in ([feature_axis] if isinstance(feature_axis, int) else feature_axis)
    }
    return tuple(a for a in range(len(shape)) if a not in kept)
