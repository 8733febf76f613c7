"""The tools for models of flax.nnx, which is imported here and not before one is given.

A tool takes a model and gives back another: `flax.nnx.clone`, in which the batch norms are changed.
"""
