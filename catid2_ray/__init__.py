"""catid2-ray: batch indexing and serving for generative retrieval in e-commerce search (CAT-ID², on Ray)."""

__version__ = "0.1.0"
