"""The block manager under hypothesis' stateful machine: whatever is done, nobody reads what is not his own."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from infer_memory import Memory, cells

from fledge.infer.blocks import BlockManager
from fledge.infer.sequence import Live

NUM_BLOCKS, BLOCK_SIZE = 10, 3
few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def sequence(id: int, tokens: list[int], salt: str = "") -> Live:
    return Live(id, list(tokens), len(tokens), max_tokens=100, salt=salt)


class Accounts(RuleBasedStateMachine):
    """Sequences over a tiny alphabet, so that beginnings are shared all the time, in a memory that is always short."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.memory = Memory(NUM_BLOCKS, BLOCK_SIZE)
        self.admitted: dict[int, Live] = {}
        self.num_made = 0

    waiting: Bundle[Live] = Bundle("waiting")

    @rule(target=waiting, tokens=few_tokens, salt=st.sampled_from("ab"))
    def make(self, tokens: list[int], salt: str) -> Live:
        self.num_made += 1
        return sequence(self.num_made, tokens, salt)

    @rule(live=consumes(waiting), use_cache=st.booleans())
    def admit(self, live: Live, use_cache: bool) -> None:
        needed, free = self.blocks.num_needed(live, use_cache=use_cache), self.blocks.num_free
        if not self.blocks.admit(live, use_cache=use_cache):
            assert needed > free
            self.blocks.forget(live)
            return
        self.admitted[live.id] = live
        assert self.blocks.num_free == free - needed
        assert live.num_computed < len(live.tokens)
        assert live.num_computed == 0 or use_cache
        expected = cells(live.salt, live.tokens[: live.num_computed])
        assert self.memory.read(live, live.num_computed) == expected, "a stale block, or another's, was served"

    def pick(self, data: st.DataObject) -> Live:
        return data.draw(st.sampled_from(list(self.admitted.values())))

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), count=st.integers(1, 8))
    def compute(self, data: st.DataObject, count: int) -> None:
        live = self.pick(data)
        end = min(live.num_computed + count, len(live.tokens))
        self.memory.write(live, live.num_computed, live.tokens[live.num_computed : end])
        live.num_computed = end
        self.blocks.publish(live)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), token=st.integers(0, 1))
    def say(self, data: st.DataObject, token: int) -> None:
        live = self.pick(data)
        if self.blocks.grow(live, len(live.tokens) + 1):
            live.tokens.append(token)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), draft=few_tokens)
    def guess_and_be_refused(self, data: st.DataObject, draft: list[int]) -> None:
        live = self.pick(data)
        if live.num_computed == len(live.tokens) and self.blocks.grow(live, len(live.tokens) + len(draft)):
            self.memory.write(live, live.num_computed, draft)
            self.blocks.trim(live, len(live.tokens))

    @precondition(lambda self: self.admitted)
    @rule(target=waiting, data=st.data())
    def preempt(self, data: st.DataObject) -> Live:
        live = self.pick(data)
        del self.admitted[live.id]
        self.blocks.release(live)
        return live

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        live = self.pick(data)
        del self.admitted[live.id]
        self.blocks.release(live)
        self.blocks.forget(live)

    @precondition(lambda self: not self.admitted)
    @rule()
    def flush(self) -> None:
        self.blocks.flush()
        assert self.blocks.num_findable == 0

    @invariant()
    def the_accounts_balance(self) -> None:
        self.blocks.check()
        held = {block for live in self.admitted.values() for block in live.blocks}
        assert len(held) + self.blocks.num_free == NUM_BLOCKS

    @invariant()
    def every_sequence_has_its_own_memory(self) -> None:
        for live in self.admitted.values():
            assert len(set(live.blocks)) == len(live.blocks)
            expected = cells(live.salt, live.tokens[: live.num_computed])
            assert self.memory.read(live, live.num_computed) == expected

    @invariant()
    def what_is_shared_is_full_and_computed_by_all_who_hold_it(self) -> None:
        holders: dict[int, list[tuple[Live, int]]] = {}
        for live in self.admitted.values():
            for index, block in enumerate(live.blocks):
                holders.setdefault(block, []).append((live, index))
        for sharing in holders.values():
            if len(sharing) > 1:
                assert all(live.num_computed >= (index + 1) * BLOCK_SIZE for live, index in sharing)
                assert len({live.salt for live, _ in sharing}) == 1


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def admitted(blocks: BlockManager, live: Live) -> Live:
    assert blocks.admit(live)
    return live


def computed(blocks: BlockManager, live: Live) -> Live:
    live.num_computed = len(live.tokens)
    blocks.publish(live)
    return live


@pytest.mark.parametrize(("length", "found"), [(11, 8), (12, 8), (13, 12)])
def test_a_prompt_seen_before_shares_its_full_blocks_but_never_its_last_token(length: int, found: int) -> None:
    blocks = BlockManager(16, 4)
    first = computed(blocks, admitted(blocks, sequence(1, list(range(length)))))
    second = admitted(blocks, sequence(2, list(range(length))))
    assert second.num_computed == found
    assert second.blocks[: found // 4] == first.blocks[: found // 4]
    assert not set(second.blocks[found // 4 :]) & set(first.blocks)


def test_another_salt_finds_nothing() -> None:
    blocks = BlockManager(16, 4)
    computed(blocks, admitted(blocks, sequence(1, [5] * 12, salt="alice")))
    assert admitted(blocks, sequence(2, [5] * 12, salt="bob")).num_computed == 0


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    blocks = BlockManager(16, 2)
    computed(blocks, admitted(blocks, sequence(1, [1, 1, 2, 2, 3])))
    assert admitted(blocks, sequence(2, [9, 9, 2, 2, 3])).num_computed == 0
    assert admitted(blocks, sequence(3, [1, 1, 9, 9, 3])).num_computed == 2


@pytest.mark.parametrize(("prompt", "found"), [([1, 1, 1, 1, 9], 2), ([2, 2, 2, 2, 9], 4)])
def test_what_was_used_longest_ago_goes_first_and_ends_before_beginnings(prompt: list[int], found: int) -> None:
    blocks = BlockManager(7, 2)
    for id, token in ((1, 1), (2, 2)):
        live = computed(blocks, admitted(blocks, sequence(id, [token] * 4 + [9])))
        blocks.release(live)
        # Of three blocks two stay findable, the partial one is blank.
    assert (blocks.num_findable, blocks.num_free) == (4, 7)
    admitted(blocks, sequence(3, [7] * 7))  # takes the three blank ones and the end of the older sequence
    assert admitted(blocks, sequence(4, prompt)).num_computed == found


def test_a_sequence_that_another_is_computing_is_awaited_until_it_is_there_or_given_up() -> None:
    blocks = BlockManager(16, 2)
    first, second = admitted(blocks, sequence(1, [1] * 7)), sequence(2, [1] * 7)
    assert blocks.is_awaiting(second)
    first.num_computed = 2
    blocks.publish(first)
    assert blocks.is_awaiting(second), "two more blocks are on their way"
    blocks.release(first)
    assert not blocks.is_awaiting(second), "nobody computes them any more"
    computed(blocks, admitted(blocks, first))
    assert not blocks.is_awaiting(second)
    assert admitted(blocks, second).num_computed == 6


def test_blocks_that_are_not_there_change_nothing() -> None:
    blocks = BlockManager(4, 2)
    live = admitted(blocks, sequence(1, [1] * 5))
    assert not blocks.grow(live, 9)
    assert not blocks.admit(other := sequence(2, [2] * 4))
    assert (len(live.blocks), other.blocks, blocks.num_free) == (3, [], 1)
    assert blocks.grow(live, 8)
    blocks.check()


def test_every_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import fledge.infer.blocks as module

    calls = []
    real = module.blake2b
    monkeypatch.setattr(module, "blake2b", lambda *args, **options: calls.append(1) or real(*args, **options))
    blocks = BlockManager(64, 4)
    live = sequence(1, [1] * 40)
    for _ in range(5):
        blocks.is_awaiting(live)
        admitted(blocks, live)
        computed(blocks, live)
        blocks.release(live)
    assert len(calls) == 1 + 10  # the salt, and ten full blocks
