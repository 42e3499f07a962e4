"""Names of methods that similar classes of other libraries have, and these have not."""

from __future__ import annotations

from typing import NoReturn


class Absent:
    """A name that similar classes have. Reading it raises an error that says what to use here."""

    def __init__(self, cure: str) -> None:
        self._cure = cure

    def __get__(self, thing: object, kind: object) -> NoReturn:
        raise AttributeError(self._cure)
