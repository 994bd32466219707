"""Hydra presets; importing this package registers the schema that validates them."""

from sparse_lightning.config import register

register()
