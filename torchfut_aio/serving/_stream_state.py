"""The state of a stream: the values, the tasks and threads that wait, and how it has ended.

No lock is held, so a signal handler or a finaliser may put, read or close in the midst of
anything. What makes that right:

1. A value is in the stream from when it is stored in ``values`` until it is deleted there. To
   delete it is to have read it. Either is one statement, within which CPython checks for no
   signal. (To find the first key takes the same time however many were deleted before it: hence
   a `Queue`.)
2. A bounded stream has ``room``: a list with an item for each value that may still come. A put
   deletes an item, then stores the value. A read deletes the value, then adds an item. So there
   are never too many values, whatever is put meanwhile. But an interrupted read puts its value
   back, perhaps when another value has come in its place. Then it notes in ``owed`` that a later
   read has to add no item.
3. A put stores the value, then wakes a reader of each loop; a read adds the item, then wakes a
   writer of each: see `_waiters`. A reader or writer that leaves with an exception calls
   `hand_on`, as it may have been woken for a value or an item that it leaves behind.
4. A put stores the value, then looks whether the stream has ended, and takes the value back if
   so, unless it has been read. A reader that finds the stream ended looks once more for a value.
   So a value that was put is read, or refused.
"""

from __future__ import annotations

from collections import deque
from typing import NoReturn

from .. import _core
from .._cpython import Queue, move_to_front
from .._errors import StreamClosedError, without_frames
from .._waiters import EVERYONE, Waiters, first

ROOM = (None,)  # for one value

_CLOSED = "closed"
_LEFT = "left"
_READ = "read"


class StreamState:
    """All of a stream; see the header of this file.

    Attributes:
        values: The outcomes that were put and not read, as keys, in order.
        room: See rule 2; None if the stream is not bounded.
        owed: How many values too many there are, as a list of so many items; see rule 2.
        end: Empty until the stream takes no more values. It was closed, with an error or None;
            or its readers have left; or both. A reader may also have come to the end.
        listeners: The iterators that may read, each by a key of its own.
        readers: The tasks and threads that wait for a value.
        writers: The tasks and threads that wait for room.
    """

    __slots__ = ("end", "listeners", "owed", "readers", "room", "values", "writers")

    def __init__(self, max_size: int | None) -> None:
        self.values: dict[_core.Outcome, None] = Queue()
        self.room = None if max_size is None else [*ROOM] * max_size
        self.owed: list[None] = []
        self.end: dict[str, _core.Outcome | None] = {}
        self.listeners: dict[object, None] = {}
        self.readers = Waiters()
        self.writers = Waiters()

    # --------------------------------------------------------------------- putting

    def put(self, outcome: _core.Outcome) -> bool:
        """Add a value to the stream. Return False if it is full.

        Raises:
            StreamClosedError: It takes no more, and the value is not in it.
        """
        if self.end:
            self._refuse()
        room = self.room
        if room is not None:
            try:
                del room[-1]
            except IndexError:
                return False
        self.values[outcome] = None
        if self.end:
            self._take_back([outcome])
        if self.readers.waiting:
            try:
                self.readers.wake()
            except BaseException:
                self.readers.wake_again()
                raise
        return True

    def put_many(self, pending: deque[_core.Outcome]) -> None:
        """Move values from ``pending`` into the stream, as far as there is room.

        Raises:
            StreamClosedError: It takes no more; those of them that were not read are not in it.
        """
        if self.end:
            self._refuse()
        outcomes = [*pending]
        try:
            self._store(pending)
            if self.end:
                self._take_back(outcomes)
            if self.readers.waiting:
                self.readers.wake(len(outcomes) - len(pending))
        except BaseException:
            self.readers.wake_again(len(outcomes))
            raise

    def _store(self, pending: deque[_core.Outcome]) -> None:
        values, room = self.values, self.room
        while pending:
            if room is not None:
                try:
                    del room[-1]
                except IndexError:
                    return
            values[pending[0]] = None
            del pending[0]

    def _take_back(self, outcomes: list[_core.Outcome]) -> None:
        taken_back = False
        for outcome in outcomes:
            try:
                del self.values[outcome]
            except KeyError:  # it was read, or had not been stored
                continue
            taken_back = True
            if self.room is not None:
                self.room += ROOM
        if taken_back:
            self._refuse()

    def _refuse(self) -> None:
        if _LEFT in self.end:
            raise StreamClosedError(
                "nothing listens to the stream any more: its readers left, by break, a "
                "cancellation, the end of a listen() block or stop_listening()"
            )
        raise StreamClosedError("the stream has been closed, and takes no more values")

    def can_write(self) -> bool:
        """Return True if a put would not block."""
        return bool(self.room) or bool(self.end)

    # --------------------------------------------------------------------- reading

    def put_back(self, outcome: _core.Outcome) -> None:
        """Undo the reading of a value that an interrupt keeps from being delivered.

        The reader calls `hand_on` after that: others may have looked and found nothing.
        """
        self.values[outcome] = None
        move_to_front(self.values, outcome)
        if self.room is not None:
            try:
                del self.room[-1]
            except IndexError:
                self.owed += ROOM  # another has just put a value: there is one too many
        self.writers.wake_again()

    def hand_on(self) -> None:
        """Wake others for what is left, as a reader or a writer leaves that may have been woken.

        It may have been woken for nothing, or not at all: to wake once too often is harmless.
        """
        try:
            if self.values and self.readers.waiting:
                self.readers.wake()
            if self.room and self.writers.waiting:
                self.writers.wake()
        except BaseException:
            self.readers.wake_again()
            self.writers.wake_again()
            raise

    def can_read(self) -> bool:
        """Return True if a read would not block."""
        return bool(self.values) or bool(self.end)

    def raise_end(self, end: type[Exception]) -> NoReturn:
        """Raise the error with which the stream was closed, or ``end`` if there is none."""
        if _LEFT not in self.end:
            self.end[_READ] = None
        failed = self.end.get(_CLOSED)
        if failed is not None and _LEFT not in self.end:
            try:
                if not self.listeners:
                    self._keep_no_frames(failed)
                failed.read()
            finally:
                del self, failed
        raise end

    def error_of_get(self) -> StreamClosedError:
        """Return the error of a get that found the stream at its end."""
        if _LEFT in self.end:
            return self._error_of_left()
        return StreamClosedError("the stream has been closed, and all its values have been read")

    # ---------------------------------------------------------------------- ending

    def is_closed(self) -> bool:
        """Return True if the producer has closed the stream."""
        return _CLOSED in self.end

    def is_listening(self) -> bool:
        """Return True if something listens, or nothing has yet."""
        return _LEFT not in self.end

    def check_listening(self) -> None:
        """Raise StreamClosedError if the reading side is closed."""
        if _LEFT in self.end:
            raise self._error_of_left()

    def _error_of_left(self) -> StreamClosedError:
        if first(self.end) == _CLOSED:  # which came first
            return StreamClosedError(
                "the stream has ended: it was closed, and then its readers left"
            )
        return StreamClosedError(
            "nothing listens to the stream any more, and its values were dropped: its readers "
            "left, by break, a cancellation, the end of a listen() block or stop_listening(); to "
            "read on after a break, stay in one block: with stream.listen() as values"
        )

    def close(self, error: _core.Outcome | None) -> None:
        """End the stream behind what is in it, unless it has been closed before."""
        try:
            refused = self.end.setdefault(_CLOSED, error) is not error or _LEFT in self.end
            if refused and error is not None:
                error.exception()  # which nothing will retrieve
            self._drop_error_if_left()
            self._wake_all()
        except BaseException:
            self._wake_all_again()
            raise

    def leave(self, listener: object) -> None:
        """Remove an iterator. If it was the last, close the reading side, unless it has ended."""
        self.listeners.pop(listener, None)
        if self.listeners:
            return
        # What is in `values` after an iterator has come to the end is about to be taken back.
        if _READ not in self.end and (self.values or _CLOSED not in self.end):
            self.stop()
            return
        failed = self.end.get(_CLOSED)
        if failed is not None and failed.is_retrieved:
            self._keep_no_frames(failed)

    def _keep_no_frames(self, failed: _core.Outcome) -> None:
        """Have later readers raise a copy of an error that is raised where nothing listens.

        Frames in its traceback lead to the stream, which would keep all that they hold.
        """
        if failed.error is not None:
            self.end[_CLOSED] = copied = _core.outcome_of_error(without_frames(failed.error))
            copied.exception()  # it need not be logged

    def stop(self) -> None:
        """Close the reading side. The values in the stream are dropped."""
        self.end[_LEFT] = None
        try:
            error = self.end.get(_CLOSED)
            if error is not None:
                error.exception()
            self._drop_error_if_left()
            self.values.clear()
            self._wake_all()
        except BaseException:
            self._wake_all_again()
            raise

    def _drop_error_if_left(self) -> None:
        # Nothing raises it any more. Its frames lead to the stream, which would keep all they hold.
        if _LEFT in self.end and _CLOSED in self.end:
            self.end[_CLOSED] = None

    def _wake_all(self) -> None:
        self.readers.wake(EVERYONE)
        self.writers.wake(EVERYONE)

    def _wake_all_again(self) -> None:
        self.readers.wake_again(EVERYONE)
        self.writers.wake_again(EVERYONE)
