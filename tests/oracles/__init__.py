"""Slow, obvious versions of what the package does fast; the tests prove them equal."""
