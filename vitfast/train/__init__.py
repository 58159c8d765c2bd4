"""Training: data, recipes, the loop, and the study built on them (`vitfast.train.study`)."""

from vitfast.train.data import DataError, ImageData, Split, batches, load
from vitfast.train.evaluate import Evaluation, evaluate, predict
from vitfast.train.loop import DivergedError, EpochLog, train
from vitfast.train.recipes import Recipe, cosine_schedule, make_optimizer, parameter_groups

__all__ = [
    "DataError",
    "DivergedError",
    "EpochLog",
    "Evaluation",
    "ImageData",
    "Recipe",
    "Split",
    "batches",
    "cosine_schedule",
    "evaluate",
    "load",
    "make_optimizer",
    "parameter_groups",
    "predict",
    "train",
]
