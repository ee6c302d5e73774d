"""Pipelines in the way of diffusers, put together from the parts of ``temporal_layers.recipes.sampling``."""
