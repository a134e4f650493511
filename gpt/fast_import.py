"""Garbage collection around large libraries: the only module that switches it."""

import gc
import importlib
from types import ModuleType


def fast_import(name: str) -> ModuleType:
    """Import a module and exclude the objects made so far from later garbage collections.

    An import frees almost nothing, but allocates enough to start many collections: without them, importing torch takes
    a sixth less time, importing MLflow a fifth, importing matplotlib a quarter (measured).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def skip_final_collection() -> None:
    """Exclude all objects from the collection at exit, which would search those of MLflow for half a second."""
    gc.freeze()
