"""Merge methods, by the names that configuration files use. How to call one: method.py."""

from cabochon.merge.methods.average import LINEAR, PASSTHROUGH
from cabochon.merge.methods.method import Method
from cabochon.merge.methods.overlap import RAM, RAMPLUS_TL, SCE
from cabochon.merge.methods.sphere import KARCHER, MULTISLERP, NUSLERP, SLERP
from cabochon.merge.methods.stock import MODEL_STOCK
from cabochon.merge.methods.swap import ARCEE_FUSION, NEARSWAP
from cabochon.merge.methods.task_vectors import TASK_VECTOR_METHODS
from cabochon.merge.methods.warp import EMA, LITI, WARP, WARP_SLERP

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(LINEAR, SLERP, NUSLERP, MULTISLERP, KARCHER),
        *TASK_VECTOR_METHODS,
        *(SCE, RAM, RAMPLUS_TL, MODEL_STOCK, NEARSWAP, ARCEE_FUSION, PASSTHROUGH),
        *(EMA, WARP_SLERP, LITI, WARP),
    )
}
