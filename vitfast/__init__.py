"""vitfast: fused kernels for vision models in PyTorch, and the Hessians of what they train."""

from vitfast import functional, hessian, nn
from vitfast._version import __version__
from vitfast.analysis import predict
from vitfast.models import accelerate, create_model, list_models, load_weights, restore
from vitfast.ops._extension import ExtensionError
from vitfast.ops.backend import BackendError, backend
from vitfast.ops.results import keep_result_memory

__all__ = [
    "BackendError",
    "ExtensionError",
    "__version__",
    "accelerate",
    "backend",
    "create_model",
    "functional",
    "hessian",
    "keep_result_memory",
    "list_models",
    "load_weights",
    "nn",
    "predict",
    "restore",
]
