"""The template of the cards that `armt card` and `armt publish` write."""

from pathlib import Path


TEMPLATE = Path(__file__).parent / "card.md.jinja"
"""Jinja template of a model card; `conversion/publishing/card.py` fills it."""
