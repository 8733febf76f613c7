"""Files of safetensors, read into NumPy."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

# How files of torch.save begin, as zip archives and before PyTorch 1.6. A safetensors file begins
# with the length of its header, for which these would be too large.
PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")

# As safetensors names them.
DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": jnp.bfloat16,
    "BOOL": "bool",
}


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    is_file = Path(path).is_file()
    data = Path(path).read_bytes() if is_file else b""
    if data.startswith(PICKLES):
        raise ValueError(
            f"normjax: {path!r} is not a safetensors file but a pickle of PyTorch, which is never "
            "read here, since a pickle may run any code. Pass torch.load(path, weights_only=True), "
            "or the state dict in it."
        )
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            f"normjax: {path!r} is a path, which needs safetensors. Install it with "
            "pip install 'normjax[safetensors]', or pass a mapping of names to arrays."
        ) from None
    if not is_file:
        raise FileNotFoundError(
            f"normjax: {path!r} is no file, expected a safetensors file. Pass its path, or a "
            "mapping of names to arrays."
        )
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"normjax: {path!r} is not a safetensors file but something else ({error}), expected "
            "a file of safetensors.torch.save_file(model.state_dict(), path)."
        ) from None
    unknown = sorted({entry["dtype"] for _, entry in entries} - set(DTYPES))
    if unknown:
        raise ValueError(
            f"normjax: {path!r} holds arrays of {', '.join(unknown)}, expected one of "
            f"{', '.join(DTYPES)}. Convert them in PyTorch first, for example by .float()."
        )
    return {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
