"""What belongs to its process, and to the one reference that its users share."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class ProcessLocal:
    """Refuse pickle, copy and deepcopy.

    A pickle would be a twin in another process that nothing here writes to or reads. A copy would
    share the state, and close it when the copy is garbage-collected.
    """

    __slots__ = ()

    _cure: ClassVar[str]
    """What to do instead, for the error."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, as it belongs to this process: "
            f"{self._cure}"
        )
