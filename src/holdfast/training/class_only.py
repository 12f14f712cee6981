"""A classmethod that refuses to be called on an instance, where its result would be thrown away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    class_only_method = classmethod
else:

    class class_only_method(classmethod):
        """A classmethod that makes a new object of its class."""

        def __get__(self, instance: Any, owner: type[Any] | None = None) -> Callable[..., Any]:
            if instance is None:
                return super().__get__(instance, owner)
            name = f"{type(instance).__name__}.{self.__func__.__name__}"

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise TypeError(
                    f"{name} makes a new object: call it on the class, not on an instance, and keep what it "
                    "returns."
                )

            return refuse
