"""Built-in models: plain readable model code, one file each, and a catalogue of them by name."""

from autopar.models.catalog import DecodeInput, get, get_decode, names
from autopar.models.serving import Serving, get_serving, serving_names
from autopar.models.step import ModelStep, TrainState

__all__ = [
    "DecodeInput",
    "ModelStep",
    "Serving",
    "TrainState",
    "get",
    "get_decode",
    "get_serving",
    "names",
    "serving_names",
]
