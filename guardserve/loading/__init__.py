"""Model loading that runs no code which the user did not name.

A source is a factory (``package.module:factory``), a ``torch.export`` archive, a TorchScript file or, only when pickle
is allowed, a pickled module. Weights alone are read with ``weights_only=True`` or from safetensors.

No code of Python's runs from a file, but a saved program is a program: it computes what its author chose. Load programs
from people you trust.
"""

from guardserve.loading.devices import resolve_device
from guardserve.loading.examples import example_input
from guardserve.loading.model import LoadedModel, load_model
from guardserve.loading.preprocessing import ImagePreprocessing, image_preprocessing

__all__ = [
    "ImagePreprocessing",
    "LoadedModel",
    "example_input",
    "image_preprocessing",
    "load_model",
    "resolve_device",
]
