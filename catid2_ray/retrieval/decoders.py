"""The search's view of any generator."""

from collections.abc import Sequence

from catid2_ray.errors import InputError
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.retrieval.causal_decoder import CausalDecoder
from catid2_ray.retrieval.t5_decoder import Decoder, T5Decoder


def decoder_for(model, *, codes_per_level: Sequence[int], weights: str = "float32") -> Decoder:
    """What `constrained_beam_search` needs of `model`: a T5, an EncoderDecoder or a CausalGenerator; a Decoder as it is.

    `weights`: "float32" for the model's own, "int8" for 8-bit copies on CPUs (not of a causal model). Raises InputError
    when the model cannot hold the IDs or cannot be made int8.
    """
    if hasattr(model, "decode_step"):
        return model
    if isinstance(model, CausalGenerator):
        if weights != "float32":
            raise InputError(f"a causal model is searched with weights='float32' only, found {weights!r}")
        return CausalDecoder(model, codes_per_level=codes_per_level)
    return T5Decoder(model, codes_per_level=codes_per_level, weights=weights)
