"""What the modules of linen and of NNX share, free of either framework.

A shell reads its variables, calls a function of this room, and stores what comes back.
"""
