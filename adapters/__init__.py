"""Temporal layers in diffusers' image models: inject, switch off, save, load, remove."""

from temporal_layers.adapters.adapter import TemporalAdapter, adapter_of, inject
from temporal_layers.adapters.config import SiteRule, TemporalConfig
from temporal_layers.adapters.merging import merge
from temporal_layers.adapters.registry import register_attention, register_model, register_resnet
from temporal_layers.adapters.sites import InjectionSite, plan
from temporal_layers.adapters.weights import AdapterWeights

__all__ = [
    "AdapterWeights",
    "InjectionSite",
    "SiteRule",
    "TemporalAdapter",
    "TemporalConfig",
    "adapter_of",
    "inject",
    "merge",
    "plan",
    "register_attention",
    "register_model",
    "register_resnet",
]
