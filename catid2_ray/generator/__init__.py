"""Stage 3, a query becomes ID tokens: subword vocabulary, models of every kind, training examples, the loss, a one-process loop.

Pure torch, transformers and numpy; nothing here knows a store, a cluster or a recipe.
"""
