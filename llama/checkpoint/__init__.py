"""Disk to weights and back: see `load.load_model`, `save.save_model` and `pull.resolve`."""
