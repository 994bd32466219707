"""Ready-made Hydra choices; importing this package registers the schema they are checked by."""

from sparse_lightning.config import register

register()
