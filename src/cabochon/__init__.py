"""The whole Gemma 2 recipe in one package: run it, train it, and see how each step works.

    import cabochon
    lm = cabochon.load()            # the model that ships inside; or a folder, or a Hugging Face id
    print(lm.generate("2+2=").text)

The names below load their modules, and with them torch, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cabochon.base.version import package_version

if TYPE_CHECKING:
    from cabochon.base.errors import CabochonError as CabochonError
    from cabochon.lm import LM as LM
    from cabochon.lm import Completion as Completion
    from cabochon.lm import load as load
    from cabochon.model.config import Gemma2Config as Gemma2Config
    from cabochon.model.gemma2 import Gemma2 as Gemma2

_HOME_OF = {
    "CabochonError": "cabochon.base.errors",
    "Completion": "cabochon.lm",
    "Gemma2": "cabochon.model.gemma2",
    "Gemma2Config": "cabochon.model.config",
    "LM": "cabochon.lm",
    "load": "cabochon.lm",
}

__all__ = ["LM", "CabochonError", "Completion", "Gemma2", "Gemma2Config", "__version__", "load"]

__version__ = package_version()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cabochon' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
