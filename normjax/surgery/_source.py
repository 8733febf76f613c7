"""The arguments of tools that run a model over batches, for linen and NNX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from normjax.surgery._accumulator import Measure
from normjax.surgery._compiled import compiled
from normjax.surgery._paths import At, is_nnx, patterns


class Source(NamedTuple):
    """The arguments of a tool that runs a model.

    Attributes:
        run: `Compiled`, or its counterpart for NNX.
        call: the function that runs the model, or None if the model itself is called.
        model: of NNX, or None.
        variables: by collection and path, as in linen.
        batches: the batches to run.
    """

    run: Any
    call: Callable | None
    model: Any
    variables: Mapping[str, Any]
    batches: Iterable[Any]

    def result(self, variables: Mapping[str, Any], at: At) -> Any:
        """New variables, or a copy of the NNX model that has them."""
        if self.model is None:
            return variables
        from normjax.surgery._nnx.layers import with_statistics

        return with_statistics(self.model, lambda _: variables, patterns(at))


def source(measure: type[Measure], call: Any, variables: Any, batches: Any, at: At) -> Source:
    """`(call, variables, batches)` of linen, `(model, batches)` or `(call, model, batches)`."""
    if is_nnx(call):
        if batches is None:
            batches = variables
        elif variables is not None:
            raise TypeError(
                "normjax: got a model of flax.nnx and variables, expected (model, batches). The "
                "model holds its variables. Where it cannot be called with a batch, pass (call, "
                "model, batches), with call(model, batch)."
            )
        call, variables = None, call
    if batches is None:
        raise TypeError(
            "normjax: got no batches, expected (call, variables, batches) for a model of "
            "flax.linen, or (model, batches) for one of flax.nnx."
        )
    if not is_nnx(variables):
        return Source(compiled(measure, call), call, None, variables, batches)
    from normjax.surgery._nnx.measure import measured

    run, held = measured(measure, variables, call, patterns(at))
    return Source(run, call, variables, held, batches)
