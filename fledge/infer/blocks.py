"""Who holds which block of the engine's key/value memory, and what can be found there again. Plain Python, no tensors.

The memory is cut into blocks of `block_size` positions (Kwon et al. 2023, PagedAttention, section 4.2). A sequence
holds a list of blocks; full ones may be held by several (they are never written again), the last, partial one has one
owner. A block that nobody holds keeps its contents and is found by the next prompt that starts alike, until it is
needed for something else: least recently used first, the ends of sequences before their beginnings.

A full block is known by a hash over everything before it and in it, and over a salt that keeps tenants, adapters and
versions of the weights apart. It is a cryptographic one (BLAKE2b, 128 bits), because the tokens are chosen by callers
and a collision would show one caller another's text. Every block is hashed once.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

from fledge.infer.sequence import Live

_DIGEST_BYTES = 16


@dataclass(eq=False)
class _Chain:
    """The hashes of a sequence's full blocks, as far as they were needed; hash b covers blocks 0 to b.

    Of its `blocks` the first `num_published` can be found by others (or an equal block can). `promised` are the
    hashes that it has undertaken to compute and publish.
    """

    root: bytes
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    promised: list[bytes] = field(default_factory=list)


class BlockManager:
    """The blocks 0 to `num_blocks - 1`. Everything is O(1) a block touched; a decode step that fills none is O(1).

    The life of a sequence: `admit` -> (`publish` after every step, `grow` before it needs more) -> `release`, perhaps
    `admit` again after preemption, and in the end `forget`. It alone writes `live.blocks`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1, f"{num_blocks} blocks"
        assert block_size >= 1, f"blocks of {block_size} positions"
        self.num_blocks, self.block_size = num_blocks, block_size
        self._holders = [0] * num_blocks  # how many sequences hold each block
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free and empty; the lowest number is taken first
        self._findable: OrderedDict[int, None] = OrderedDict()  # free with contents, the next one to go first
        self._chains: dict[int, _Chain] = {}
        self._promised_by: dict[bytes, int] = {}  # hash -> id of the sequence that is computing the block

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, those with contents included."""
        return len(self._blank) + len(self._findable)

    @property
    def num_findable(self) -> int:
        """Free blocks whose contents can still be found."""
        return len(self._findable)

    def blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def is_awaiting(self, live: Live) -> bool:
        """Whether the first block that `live` does not find is being computed by another sequence right now.

        Waiting for it is cheaper than computing it twice: so the answers to one prompt share its blocks.
        """
        found = self._find(live)
        hashes = self._chain(live).hashes
        return len(found) < self._num_sharable(live) and hashes[len(found)] in self._promised_by

    def num_needed(self, live: Live, *, use_cache: bool = True) -> int:
        """How many free blocks `admit` would take for `live`, found ones that nobody holds included."""
        found = self._find(live) if use_cache else []
        return self.blocks_for(len(live.tokens)) - sum(self._holders[block] > 0 for block in found)

    def admit(self, live: Live, *, use_cache: bool = True) -> bool:
        """Give `live` blocks for all its tokens; False, and nothing changed, if there are too few.

        The longest run of full blocks that is found is shared, but never the last token's: the model must still be
        run on one token to know what follows. Sets `live.blocks` and `live.num_computed`.
        """
        assert not live.blocks, f"sequence {live.id} holds blocks already"
        found = self._find(live) if use_cache else []
        if self.num_needed(live, use_cache=use_cache) > self.num_free:
            return False
        for block in found:
            self._hold(block)
        live.blocks = found
        live.num_computed = len(found) * self.block_size
        chain = self._chain(live)
        chain.num_published = len(found)
        chain.promised = chain.hashes[len(found) : self._num_sharable(live)] if use_cache else []
        for digest in chain.promised:
            self._promised_by.setdefault(digest, live.id)
        grown = self.grow(live, len(live.tokens))
        assert grown, "the blocks were counted before"
        return True

    def grow(self, live: Live, num_positions: int) -> bool:
        """Let `live` hold blocks for its first `num_positions` positions; False, and nothing changed, if too few."""
        num_missing = self.blocks_for(num_positions) - len(live.blocks)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            live.blocks.append(self._take())
        return True

    def trim(self, live: Live, num_positions: int) -> None:
        """Give back the blocks of `live` wholly behind its first `num_positions` positions (a refused draft's)."""
        keep = self.blocks_for(num_positions)
        if len(live.blocks) > keep:
            self._drop(live.blocks[keep:])
            del live.blocks[keep:]

    def publish(self, live: Live) -> None:
        """Let the blocks that `live` has computed wholly (`num_computed`) be found by others."""
        num_full = live.num_computed // self.block_size
        chain = self._chains[live.id]
        if num_full == chain.num_published:
            return
        self._extend(chain, live, num_full)
        for index in range(chain.num_published, num_full):
            digest, block = chain.hashes[index], live.blocks[index]
            if digest not in self._block_of:  # else an equal block is found already, and this one stays unknown
                self._block_of[digest], self._hash_of[block] = block, digest
            if self._promised_by.get(digest) == live.id:
                del self._promised_by[digest]
        chain.num_published = num_full

    def release(self, live: Live) -> None:
        """Take all blocks from `live`; what is published stays findable. `num_computed` becomes 0."""
        chain = self._chain(live)
        for digest in chain.promised:
            if self._promised_by.get(digest) == live.id:
                del self._promised_by[digest]
        chain.promised = []
        chain.num_published = 0
        self._drop(live.blocks)
        live.blocks = []
        live.num_computed = 0

    def forget(self, live: Live) -> None:
        """The last word on `live`, which holds no blocks any more: its hashes are not needed again."""
        assert not live.blocks, f"sequence {live.id} still holds blocks"
        self._chains.pop(live.id, None)

    def flush(self) -> None:
        """No contents are found any more (the weights changed). To be called while no sequence holds blocks."""
        assert self.num_free == self.num_blocks, "blocks are held"
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._findable.clear()
        self._blank = list(range(self.num_blocks - 1, -1, -1))

    def check(self) -> None:
        """Assert that the accounts balance: O(blocks), for tests and fault finding."""
        blank, findable = set(self._blank), set(self._findable)
        assert len(blank) == len(self._blank), "a block is free twice"
        assert not blank & findable, "a free block is both empty and findable"
        free = {block for block, num_holders in enumerate(self._holders) if num_holders == 0}
        assert blank | findable == free, "a block is neither free nor held, or both"
        assert all(self._hash_of[block] is None for block in blank), "an empty block has a hash"
        assert all(self._hash_of[block] is not None for block in findable), "a findable block has no hash"
        known = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        assert known == self._block_of, "the table of hashes and the blocks disagree"

    def _num_sharable(self, live: Live) -> int:
        return (len(live.tokens) - 1) // self.block_size

    def _find(self, live: Live) -> list[int]:
        """The longest run of blocks that hold the beginning of `live.tokens`; always leaves a token to run."""
        chain = self._chain(live)
        num_sharable = self._num_sharable(live)
        self._extend(chain, live, num_sharable)
        found: list[int] = []
        for digest in chain.hashes[:num_sharable]:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _chain(self, live: Live) -> _Chain:
        chain = self._chains.get(live.id)
        if chain is None:
            root = blake2b(live.salt.encode(), digest_size=_DIGEST_BYTES).digest()
            chain = self._chains[live.id] = _Chain(root)
        return chain

    def _extend(self, chain: _Chain, live: Live, num_full: int) -> None:
        size = self.block_size
        for index in range(len(chain.hashes), num_full):
            before = chain.hashes[-1] if chain.hashes else chain.root
            own = array("q", live.tokens[index * size : (index + 1) * size]).tobytes()
            chain.hashes.append(blake2b(before + own, digest_size=_DIGEST_BYTES).digest())

    def _hold(self, block: int) -> None:
        if self._holders[block] == 0:
            del self._findable[block]
        self._holders[block] += 1

    def _take(self) -> int:
        """A free block for new contents; what it held is not found any more."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._findable.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            del self._block_of[digest]
            self._hash_of[block] = None
        self._holders[block] = 1
        return block

    def _drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # so that the end of a sequence is overwritten before its beginning
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._findable[block] = None
