"""Stage 4: a query becomes products, by constrained beam search over the trie of all IDs.

Torch and numpy in one process; nothing here knows a store or a cluster.
"""
