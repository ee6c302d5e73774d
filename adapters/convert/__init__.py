"""Published video weights, both ways: AnimateDiff, Stable Video Diffusion and ModelScope.

from temporal_layers.adapters.convert import load_foreign

adapter, report = load_foreign(unet, "v3_sd15_mm.ckpt")
print(report.summary())
"""

from temporal_layers.adapters.convert.detection import detect
from temporal_layers.adapters.convert.exporting import export_foreign, save_foreign
from temporal_layers.adapters.convert.images import image_model_of, micro_conditioning
from temporal_layers.adapters.convert.loading import load_foreign, source_of
from temporal_layers.adapters.convert.report import ConversionReport
from temporal_layers.adapters.convert.source import Source

__all__ = [
    "ConversionReport",
    "Source",
    "detect",
    "export_foreign",
    "image_model_of",
    "load_foreign",
    "micro_conditioning",
    "save_foreign",
    "source_of",
]
