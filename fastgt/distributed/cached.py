"""Properties that are computed once, where other ranks may have to be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class cached_property(Generic[Value]):
    """As ``functools.cached_property``, whose lock is that of all instances before Python 3.12.

    A rank would keep it while it waits for others, and those, as threads of the same process, would
    wait for the lock.
    """

    def __init__(self, compute: Callable[[Any], Value]):
        self._compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[Value]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...
    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        # the next time Python finds it there
        found = instance.__dict__[self._name] = self._compute(instance)
        return found
