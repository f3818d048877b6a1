"""Stage 0: what a product is, what a judged pair is, and the text that stands for a product."""
