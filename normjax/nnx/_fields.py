"""The fields that all NNX norms have; keyword-only but for the first, as in Flax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from normjax.nnx._adapter import Metadata, make_affine


@dataclass(eq=False, repr=False)
class Scaled(nnx.Module):
    """A norm with a scale."""

    num_features: int
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: InitVar[Initializer] = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]
    scale_metadata: InitVar[Metadata] = None

    def __post_init__(self, scale_init: Any, rngs: Any, scale_metadata: Any) -> None:
        make_affine(self, rngs, scale=(scale_init, scale_metadata))


@dataclass(eq=False, repr=False, kw_only=True)
class Affine(Scaled):
    """A norm with a scale and a bias."""

    use_bias: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    bias_metadata: InitVar[Metadata] = None

    def __post_init__(
        self, scale_init: Any, rngs: Any, scale_metadata: Any, bias_init: Any, bias_metadata: Any
    ) -> None:
        scale, bias = (scale_init, scale_metadata), (bias_init, bias_metadata)
        make_affine(self, rngs, scale=scale, bias=bias)
