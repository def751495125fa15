"""The demonstration behind `armt demo`, and the small backbone it uses."""

from pathlib import Path


BACKBONE = Path(__file__).parent / "backbone"
"""Folder of a Llama of 1.9 million parameters, trained from English novels by `train_backbone.py`."""
