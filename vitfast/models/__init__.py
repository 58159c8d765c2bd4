"""Whole models, made by name."""

from vitfast.models.acceleration import accelerate, register_attention, restore
from vitfast.models.alternet import AlterNet
from vitfast.models.registry import create_model, list_models, register
from vitfast.models.resnet import ResNet
from vitfast.models.swin import SwinTransformer
from vitfast.models.vit import VisionTransformer
from vitfast.models.weights import load_weights

__all__ = [
    "AlterNet",
    "ResNet",
    "SwinTransformer",
    "VisionTransformer",
    "accelerate",
    "create_model",
    "list_models",
    "load_weights",
    "register",
    "register_attention",
    "restore",
]
