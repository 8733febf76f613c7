"""Code that the modules of linen and NNX share; it imports neither.

A module reads its variables, calls a function of this package, and stores the results.
"""
