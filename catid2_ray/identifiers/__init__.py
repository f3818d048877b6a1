"""Stage 2: codes become IDs that no two products share, and figures say how good they are.

Arrays in, arrays out (numpy, SciPy, POT); nothing here knows the quantizer, a store or a cluster.
"""
