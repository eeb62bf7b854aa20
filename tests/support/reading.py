"""Reads of objects through a Store, as the tests of all stores make them."""

from ckptfs._store.base import Pin, Store


def read_range(
    store: Store, pin: Pin, offset: int = 0, length: int | None = None
) -> tuple[bytes, bool]:
    """The bytes, and whether the store's answer has confirmed their version.

    Without `length`, the range ends with the object.
    """
    buffer = bytearray(pin.size - offset if length is None else length)
    is_confirmed = store.read_into(pin, offset, memoryview(buffer))
    return bytes(buffer), is_confirmed
