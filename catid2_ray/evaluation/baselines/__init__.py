"""Retrievers that a generative one must stand beside."""
