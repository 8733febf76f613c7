"""The tools for models of flax.nnx, which is imported only if such a model is given.

A tool takes a model and returns a copy (`flax.nnx.clone`) with changed batch norms.
"""
