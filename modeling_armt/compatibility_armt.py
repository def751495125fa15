"""
What transformers renamed within the versions that one checkpoint's code serves (5.17 to the newest).

5.24 calls `cache` what was `past_key_values`: generate passes only that name, and outputs have that field. A forward
here takes both names, and its outputs can be read under both. This file can go when 5.24 is the oldest version served.
"""

from dataclasses import dataclass, fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


NAMES = ("cache", "past_key_values")
# What the installed transformers calls it: as an argument of forward and of generate's helpers, and in outputs.
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in NAMES)
_OTHER = next(name for name in NAMES if name != CACHE)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """
    The cache that a call was given under either name, None if under none.

    Raises:
        ValueError: if it was given two.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
    return past_key_values if cache is None else cache


def with_both_names(output: Any) -> Any:
    """What the stock `generate` returned; if it is an output with a cache, that is an attribute under both names."""
    if CACHE != "cache" and hasattr(output, CACHE):  # later ones do it themselves
        output.cache = getattr(output, CACHE)
    return output


class _BothNames:
    """An output whose cache is an item and an attribute under both names."""

    def __getitem__(self, key):
        return super().__getitem__(CACHE if key == _OTHER else key)

    def __contains__(self, key):
        return super().__contains__(CACHE if key == _OTHER else key)

    def get(self, key, default=None):
        return super().get(CACHE if key == _OTHER else key, default)


setattr(
    _BothNames, _OTHER, property(lambda self: getattr(self, CACHE), lambda self, cache: setattr(self, CACHE, cache))
)


@dataclass
class ARMTModelOutput(_BothNames, BaseModelOutputWithPast):
    """[`BaseModelOutputWithPast`] with the cache under both names."""


@dataclass
class ARMTCausalLMOutput(_BothNames, CausalLMOutputWithPast):
    """[`CausalLMOutputWithPast`] with the cache under both names."""
