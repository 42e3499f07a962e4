"""Objects that belong to one process, and to the one reference that its users share."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class ProcessLocal:
    """Refuse pickle, copy and deepcopy.

    A pickle would be a twin in another process that nothing here writes to or reads. A copy would
    share the state, and close it when the copy is garbage-collected.
    """

    __slots__ = ()

    _what: ClassVar[str]
    """What it is, for the error."""

    _cure: ClassVar[str]
    """What to do instead."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{self._what} cannot be pickled or copied, as it belongs to this process: {self._cure}"
        )
