"""Objects that cannot leave their process or be copied."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class ProcessLocal:
    """Refuse pickle, copy and deepcopy.

    An object unpickled in another process would be connected to nothing. A copy would share the
    state, and close it when the copy is garbage-collected.
    """

    __slots__ = ()

    _what: ClassVar[str]
    """The name of such an object, for the error."""

    _cure: ClassVar[str]
    """What to do instead."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{self._what} cannot be pickled or copied, as it belongs to this process: {self._cure}"
        )
