"""What is derived from tensors and kept beside them, and whether it is still theirs.

A copy in another layout is right as long as its sources are the same tensors, on the same memory,
and nobody has written to them. `Source` remembers the three; `mark` ties it to the copy, so that an
op which is handed both can see for itself: inside of a compiled graph nobody else can.

Writes through `.data` are not counted by torch and not noticed.
"""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_MARK = "_fewstep_source"


class Source:
    """Tensors as they are now. Does not keep them alive."""

    def __init__(self, *tensors: Tensor):
        # A storage that is only an address could be another one by now.
        self._then = [
            (weakref.ref(x), _version(x), StorageWeakRef(x.untyped_storage())) for x in tensors
        ]

    def is_current(self, *tensors: Tensor) -> bool:
        """Return whether these are the same tensors with the same values."""
        return all(
            then() is now
            and version == _version(now)
            and storage.cdata == now.untyped_storage()._cdata
            for now, (then, version, storage) in zip(tensors, self._then, strict=True)
        )


def mark(derived: Tensor, source: Source) -> None:
    """Remember what a tensor was made from."""
    setattr(derived, _MARK, source)


def is_stale(derived: Tensor, *tensors: Tensor) -> bool:
    """Return whether a marked tensor was made from others than these, or from older values."""
    source = getattr(derived, _MARK, None)
    return source is not None and not source.is_current(*tensors)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
