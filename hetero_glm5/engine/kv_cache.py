"""Pages of the KV pool: which are free. A page is `page_size` consecutive cache slots; page p starts at p·page_size."""

from __future__ import annotations


class PagePool:
    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Extends `pages` to hold `tokens`; False, and nothing taken, if the pool has too few."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, pages: list[int]) -> None:
        """Gives all of `pages` back and empties the list."""
        self._free.extend(reversed(pages))
        pages.clear()
        assert len(self._free) <= self.num_pages, "a page was given back twice"
