"""catid2-ray: batch indexing and serving for generative retrieval in e-commerce search (CAT-ID², on Ray)."""

import os

__version__ = "0.1.0"

# Of a model without safetensors transformers would ask the hub, in a thread, for a converted copy; we read its tensors as they are.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
