"""What runs a model over batches, and its variables, in either framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from normjax.surgery._accumulator import Measure
from normjax.surgery._compiled import compiled
from normjax.surgery._paths import At, is_nnx, patterns


class Source(NamedTuple):
    """What a tool that runs the model was given.

    Attributes:
        run: `Compiled`, or what does its job for NNX.
        call: what was given to run the model, or None where the model is called itself.
        model: of NNX, or None.
        variables: by collection and path, as linen has them.
        batches: what the model runs over.
    """

    run: Any
    call: Callable | None
    model: Any
    variables: Mapping[str, Any]
    batches: Iterable[Any]

    def result(self, variables: Mapping[str, Any], at: At) -> Any:
        """Variables with other statistics, in the form in which the old ones were given."""
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
