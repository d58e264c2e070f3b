"""Damage to files, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st


def flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with one bit turned over."""

    def turn(position: int) -> bytes:
        byte, bit = divmod(position, 8)
        return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]

    return st.integers(0, 8 * len(content) - 1).map(turn)


def truncated(content: bytes) -> st.SearchStrategy[bytes]:
    """The content without its end."""
    return st.integers(0, len(content) - 1).map(lambda size: content[:size])
