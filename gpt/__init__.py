"""chargpt: train, evaluate and sample a small GPT.

`gpt.load(path)` loads a checkpoint; see docs/api.md. Names are imported on first use, so `import gpt` is fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.api import LoadedModel, load
    from gpt.core.errors import UserError

    __version__: str

__all__ = ["LoadedModel", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            return version("chargpt")
        except PackageNotFoundError:
            return "0+unknown"  # a copy of the source that is not installed
    if name in __all__:
        from gpt import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module 'gpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
