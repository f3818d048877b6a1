"""Stage 1: embeddings become codes (CAT-ID², section 3): losses, model, start, training step, health of the codebooks.

Torch only; needs neither Ray nor a recipe, so a notebook or a bare GPU machine can train with `step.fit`.
"""
