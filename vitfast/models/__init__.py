"""Whole models, made by name."""

from vitfast.models.acceleration import accelerate, register_attention, restore
from vitfast.models.alternet import AlterNet
from vitfast.models.registry import create_model, list_models, register
from vitfast.models.resnet import ResNet

__all__ = [
    "AlterNet",
    "ResNet",
    "accelerate",
    "create_model",
    "list_models",
    "register",
    "register_attention",
    "restore",
]
