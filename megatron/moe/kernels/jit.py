"""``triton.jit`` with the types of its use: ``kernel[grid](*arguments)`` on the host, a call inside another kernel."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:

    class Kernel(Protocol):
        """A compiled function. Triton types its launch as the function itself, whose constants are ``constexpr``."""

        def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., None]:
            """The launch on a grid of programs."""
            ...

        def __call__(self, *args: Any) -> Any:
            """Inside another kernel."""
            ...

    def jit(function: Callable[..., Any], /) -> Kernel:
        """``triton.jit``."""
        ...

else:
    from triton import jit

__all__ = ["cdiv", "jit", "next_power_of_2"]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below ``n`` >= 1, on the host."""
    return 1 << (n - 1).bit_length()
