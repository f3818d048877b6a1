"""Recipes that earlier versions stored with their artefacts, read with the meaning that they had then.

A stored recipe names every setting that existed when it was stored. A setting that it lacks came later; where the default of
today is not what was done before there was a choice, MEANT says what was.
"""

import copy

# Of settings that came after format 6 (0.1): what was done before, where that is not what today's default or a kind's preset says.
MEANT: dict[str, object] = {
    "catalog.allow_leak": True,  # queries in train and test went unnoticed
    "embedding.adapter": "none",  # quantizer and search read the encoder's vectors as they were
    "quantizer.encoder": "mlp",  # and `latent`, which every stored recipe names, was a number
    "quantizer.category_on": "residual",
    "quantizer.category_temperature": None,
    "quantizer.category_decay": 0.0,
    "evaluation.diagnose_rows": 0,  # nothing was diagnosed
    "serving.search": "beam",
    "serving.node_depth": 0,
    "serving.expansion.weights": "stated",
    "serving.lookahead.try_logp_weight": [],
}
# Settings that are gone: nothing depends on them any more.
GONE: frozenset[str] = frozenset()


def as_meant(stored: dict) -> dict:
    """The values of a stored recipe, completed and cleared so that today's model reads them."""
    values = copy.deepcopy(stored)
    for path, meaning in MEANT.items():
        section, *inner, name = path.split(".")
        settings = values.setdefault(section, {})
        for part in inner:
            settings = (settings or {}).get(part)
        if settings is not None:  # a part that the recipe does without has no settings
            settings.setdefault(name, meaning)
    for path in GONE:
        section, name = path.split(".")
        values.get(section, {}).pop(name, None)
    return values
