"""The prefix cache: a tree of KV pages by the tokens in them, which sequences share.

A node is one page: the keys of its tokens, given all tokens of the nodes above it. A sequence holds the nodes of its
full pages, so that those stay; a page that no sequence holds stays too, until another needs the room: then the least
recently used leaf goes. The last page of a sequence that has ended, perhaps not full, is a leaf. A newcomer shares the
full pages that agree with its tokens, and copies the part of one more page that does, from the tree or from a sequence
that is still running: no token is computed twice because of where pages end. Tokens are known by value and by their
whole past, so that what is found can be trusted whatever sequence wrote it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from hetero_glm5.core import Sequence, SlotCopy
from hetero_glm5.engine.kv_cache import PagePool

NO_PAGE = -1  # of a root, which stands for no tokens

Tokens = tuple[int, ...]
Trust = Literal["all", "kept", "found"]
Key = Callable[[bytes | None, Tokens, str | None], bytes]  # of the page above, the tokens, the salt


@dataclass(eq=False)
class Node:
    """`users`: sequences that hold it, and copies that wait. `used`: when the last of them let go."""

    page: int
    tokens: Tokens
    parent: Node | None
    key: bytes = b""  # of the page in the page store, if there is one
    children: dict[Tokens, Node] = field(default_factory=dict)
    order: list[Tokens] = field(default_factory=list)  # the children's, sorted
    users: int = 0
    used: int = 0
    salt: str | None = None  # a root's

    @property
    def cut(self) -> bool:
        """Whether it was taken out of the tree, with all below it."""
        return self.parent is None and self.page != NO_PAGE

    def nearest(self, tokens: Tokens) -> tuple[Node | None, int]:
        """The child that begins most like `tokens`, and how many tokens agree. In sorted order it is a neighbour."""
        at = bisect_left(self.order, tokens)
        best, most = None, 0
        for near in self.order[max(at - 1, 0) : at + 1]:
            same = common(near, tokens)
            if same > most:
                best, most = self.children[near], same
        return best, most


@dataclass(frozen=True)
class Match:
    """What the cache has of a sequence's tokens: whole pages, then `part` tokens of the page `source`, which is the
    node `leaf`'s or a running sequence's."""

    nodes: list[Node]
    part: int = 0
    source: int = -1
    leaf: Node | None = None


class PrefixCache:
    """`enabled` False: nothing is found, and nothing kept. With `key`, nodes of full pages get one, and take_fresh()
    lists them."""

    def __init__(self, pool: PagePool, *, enabled: bool = True, key: Key | None = None):
        self.pool, self.enabled, self._key = pool, enabled, key
        self._fresh: list[Node] = []
        self._roots: dict[str | None, Node] = {}
        self._held: dict[Sequence, list[Node]] = {}
        self._found: dict[Sequence, int] = {}  # how many of them it did not compute
        self._pinned: list[Node] = []  # sources of copies that wait
        self._idle = 0  # nodes without users
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (used, number, node); some are out of date
        self._clock, self._numbers = count(1), count()

    @property
    def num_available(self) -> int:
        """Pages that are free or can be made so."""
        return self.pool.num_free + self._idle

    @property
    def num_kept(self) -> int:
        """Pages that are kept though no running sequence holds them."""
        return self._idle

    def match(self, seq: Sequence, running: Iterable[Sequence] = ()) -> Match:
        """The longest known beginning of the sequence's tokens, but for the last token, whose logits are needed."""
        node = self._roots.get(seq.salt)
        nodes: list[Node] = []
        size, tokens = self.pool.page_size, seq.tokens[:-1]
        if seq.reads_prompt or not self.enabled:
            return Match([])
        while node is not None and (len(nodes) + 1) * size <= len(tokens):
            child = node.children.get(tuple(tokens[len(nodes) * size : (len(nodes) + 1) * size]))
            if child is None:
                break
            nodes.append(child)
            node = child
        found = Match(nodes)
        if node is not None:
            leaf, part = node.nearest(tuple(tokens[len(nodes) * size :][:size]))
            if leaf is not None:
                found = Match(nodes, part, leaf.page, leaf)
        return self._better(found, seq.salt, tokens, running)

    def _better(self, found: Match, salt: str | None, tokens: list[int], running: Iterable[Sequence]) -> Match:
        """The match, with a longer part of a page if a running sequence has one."""
        size, at = self.pool.page_size, len(found.nodes) * self.pool.page_size
        for other in running:
            stop = min(at + size, other.num_computed)
            if other.salt == salt and stop - at > found.part and tokens[:at] == other.tokens[:at]:
                part = common(tokens[at : at + size], other.tokens[at:stop])
                if part > found.part:
                    found = Match(found.nodes, part, other.pages[at // size])
        return found

    def new_pages(self, match: Match, tokens: int) -> int:
        """Of the available pages, how many a sequence with that match takes, to hold so many tokens."""
        return self.pool.pages_for(tokens) - sum(node.users > 0 for node in match.nodes)

    def hold(self, seq: Sequence, match: Match) -> None:
        """The sequence begins with the pages that were found whole."""
        assert not seq.pages and seq.num_computed == 0
        self._held[seq], self._found[seq] = list(match.nodes), len(match.nodes)
        for node in match.nodes:
            self._use(node)
            seq.pages.append(node.page)
        seq.num_computed = len(seq.pages) * self.pool.page_size

    def copy_part(self, seq: Sequence, match: Match) -> SlotCopy | None:
        """The rest of what was found: a copy to be made before anything is computed. None if no page is available."""
        if not match.part:
            return None
        pinned = [match.leaf, *reversed(match.nodes)] if match.leaf is not None else []  # it, and all above it
        for node in pinned:  # before a page is looked for
            self._use(node)
        if not self.grow(seq, seq.num_computed + 1):
            for node in pinned:
                self._drop_use(node)
            return None
        self._pinned += pinned
        seq.num_computed += match.part
        return SlotCopy(match.source, seq.pages[-1], match.part)

    def unpin(self) -> None:
        """The copies were made, or never will be."""
        for node in self._pinned:
            self._drop_use(node)
        self._pinned.clear()

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Gives the sequence pages to hold so many tokens; False, and nothing taken, if there are too few."""
        missing = self.pool.pages_for(tokens) - len(seq.pages)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        while self.pool.num_free < missing:
            self._evict()
        return self.pool.grow(seq.pages, tokens)

    def room(self, seq: Sequence) -> int:
        """How many more tokens the sequence could compute with the pages that are available."""
        return (len(seq.pages) + self.num_available) * self.pool.page_size - seq.num_computed

    def keep(self, seq: Sequence) -> None:
        """Makes nodes of the sequence's pages that have been computed whole."""
        if not self.enabled:
            return
        size, nodes = self.pool.page_size, self._held.setdefault(seq, [])
        while (len(nodes) + 1) * size <= seq.num_computed:
            at = len(nodes)
            above = nodes[-1] if nodes else self._root(seq.salt)
            if above.cut:
                return
            tokens = tuple(seq.tokens[at * size : (at + 1) * size])
            node = above.children.get(tokens)
            if node is None:
                node = self._insert(above, seq.pages[at], tokens)
                if self._key is not None:
                    node.key = self._key(above.key or None, tokens, seq.salt)
                    self._fresh.append(node)
            elif node.page != seq.pages[at]:  # somebody else was sooner: one page is enough
                self.pool.release([seq.pages[at]])
                seq.pages[at] = node.page
            self._use(node)
            nodes.append(node)

    def release(self, seq: Sequence, trust: Trust = "all") -> list[bytes]:
        """The sequence lets go of its pages. What was computed in them stays in the tree, as far as it can be trusted:
        "all"; what is "kept" there already; or only what it "found" there, so that nobody finds what it computed
        itself. Returns the keys of what is not kept for that."""
        if trust == "all":
            self.keep(seq)
        nodes, found = self._held.pop(seq, []), self._found.pop(seq, 0)
        own = seq.pages[len(nodes) :]
        part = seq.num_computed - len(nodes) * self.pool.page_size
        if trust == "all" and self.enabled and 0 < part < self.pool.page_size:
            above = nodes[-1] if nodes else self._root(seq.salt)
            tokens = tuple(seq.tokens[seq.num_computed - part : seq.num_computed])
            if not above.cut and above.nearest(tokens)[1] < part:
                self._retire(self._insert(above, own.pop(0), tokens))
        doubtful = self._cut(nodes[found]) if trust == "found" and found < len(nodes) else []
        for node in reversed(nodes):
            self._drop_use(node)
        self.pool.release(own)
        seq.pages.clear()
        seq.num_computed, seq.drafts = 0, ()
        return doubtful

    def take_fresh(self) -> list[Node]:
        """Nodes of full pages that were added since the last call, and are still there."""
        fresh, self._fresh = self._fresh, []
        return [node for node in fresh if node.parent is not None]

    def clear(self) -> None:
        """Forgets what no running sequence holds."""
        while self._idle:
            self._evict()

    def _root(self, salt: str | None) -> Node:
        return self._roots.setdefault(salt, Node(NO_PAGE, (), None, salt=salt))

    def _insert(self, above: Node, page: int, tokens: Tokens) -> Node:
        node = above.children[tokens] = Node(page, tokens, above)
        insort(above.order, tokens)
        self._idle += 1
        for shorter in self._prefixes(above, tokens):
            if not shorter.users:
                self._remove(shorter)
        return node

    def _prefixes(self, above: Node, tokens: Tokens) -> list[Node]:
        """Children whose tokens begin `tokens`: they say nothing that it does not."""
        at = bisect_left(above.order, tokens)
        first = bisect_left(above.order, tokens[:1])
        return [above.children[t] for t in above.order[max(first, at - 8) : at] if common(t, tokens) == len(t)]

    def _use(self, node: Node) -> None:
        self._idle -= node.users == 0
        node.users += 1

    def _drop_use(self, node: Node) -> None:
        node.users -= 1
        if node.users == 0:
            self._idle += 1
            self._retire(node)

    def _retire(self, node: Node) -> None:
        """Nobody holds the node now: it may be evicted, unless it has children or is found again."""
        node.used = next(self._clock)
        if node.parent is None:  # cut off
            self._idle -= 1
            self.pool.release([node.page])
        elif not node.children:
            self._offer(node)

    def _offer(self, node: Node) -> None:
        """Lets a leaf be evicted, in its turn."""
        if len(self._leaves) > 4 * self.pool.num_pages:
            self._leaves = [entry for entry in self._leaves if _in_date(*entry)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.used, next(self._numbers), node))

    def _evict(self) -> None:
        while True:
            entry = heapq.heappop(self._leaves)
            if _in_date(*entry):
                self._remove(entry[2])
                return

    def _remove(self, node: Node) -> None:
        """Frees a leaf without users."""
        above = node.parent
        assert above is not None and not node.users and not node.children
        self._detach(node)
        self._idle -= 1
        self.pool.release([node.page])
        if above.parent is not None and not above.users and not above.children:
            self._offer(above)

    def _detach(self, node: Node) -> None:
        above, node.parent = node.parent, None
        assert above is not None
        del above.children[node.tokens]
        del above.order[bisect_left(above.order, node.tokens)]
        if not above.children and self._roots.get(above.salt) is above:
            del self._roots[above.salt]

    def _cut(self, top: Node) -> list[bytes]:
        """Takes a node and all below it out of the tree, and returns the keys that they have; what has users is freed
        with the last of them."""
        if top.parent is None:  # was cut before
            return []
        cut = _with_descendants(top)
        for node in reversed(cut):
            self._detach(node)
            if not node.users:
                self._idle -= 1
                self.pool.release([node.page])
        return [node.key for node in cut if node.key]


def _in_date(used: int, number: int, node: Node) -> bool:
    """Whether the heap's entry still says that the node is a leaf without users, last used then."""
    return node.parent is not None and not node.users and not node.children and node.used == used


def _with_descendants(node: Node) -> list[Node]:
    """The node, and all below it, each after its parent."""
    found = [node]
    for each in found:
        found += each.children.values()
    return found


def common(a: Tokens | list[int], b: Tokens | list[int]) -> int:
    """How many tokens `a` and `b` have in common from the start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
