"""Buffers for spans: reuse, and memory that a thread copies from meanwhile."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckptfs._daemon.cache.buffer_pool import Buffer, Buffers, Lent, capacity_of

MIB = 1 << 20
LENGTHS = st.integers(1, 5 * MIB)


def test_a_lent_buffer_is_not_taken() -> None:
    buffers: Buffers[str] = Buffers(MIB, lambda _: None)
    first = buffers.take(MIB)
    buffers.keep(first)
    lent = buffers.lend([b"head", first.view[:10]])
    assert buffers.is_lent(first.memory)
    second = buffers.take(MIB)  # beyond the limit, because the only other one is lent
    assert second is not first
    assert buffers.total_bytes == 2 * MIB
    buffers.release(second)
    assert buffers.total_bytes == MIB
    buffers.take_back(lent)
    assert buffers.take(MIB) is first


def test_a_buffer_that_is_lent_after_its_release_is_not_taken() -> None:
    buffers: Buffers[str] = Buffers(4 * MIB, lambda _: None)
    first = buffers.take(MIB)
    buffers.release(first)
    lent = buffers.lend([first.view])
    second = buffers.take(MIB)
    assert second is not first
    buffers.take_back(lent)
    assert buffers.take(MIB) is first


def test_a_buffer_that_is_released_while_it_is_lent_is_free_afterwards() -> None:
    buffers: Buffers[str] = Buffers(4 * MIB, lambda _: None)
    first = buffers.take(MIB)
    once, again = buffers.lend([first.view]), buffers.lend([first.view[5:]])
    buffers.release(first)
    buffers.take_back(once)
    second = buffers.take(MIB)
    assert second is not first
    buffers.take_back(again)
    assert buffers.take(MIB) is first
    assert buffers.total_bytes == 2 * MIB


def test_trim_forgets_a_buffer_that_is_still_lent() -> None:
    buffers: Buffers[str] = Buffers(4 * MIB, lambda _: None)
    first = buffers.take(MIB)
    lent = buffers.lend([first.view])
    buffers.release(first)
    buffers.trim()
    assert buffers.total_bytes == 0
    first.view[0] = 7  # the memory is there as long as somebody has it
    buffers.take_back(lent)
    assert buffers.take(MIB) is not first
    assert buffers.total_bytes == MIB


def test_trim_leaves_what_may_stay_while_nothing_is_read() -> None:
    buffers: Buffers[str] = Buffers(8 * MIB, lambda _: None, idle_bytes_max=3 * MIB)
    for buffer in [buffers.take(length) for length in (MIB, MIB, 2 * MIB, MIB)]:
        buffers.release(buffer)
    buffers.trim()
    assert 0 < buffers.total_bytes <= 3 * MIB


class Model(RuleBasedStateMachine):
    """Every buffer is filled with a number of its own when it is taken, which poisons what was in
    it. The bytes of a loan must stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: Buffers[int] = Buffers(6 * MIB, self.forget)
        self.busy: list[Buffer[int]] = []
        self.kept: list[Buffer[int]] = []
        self.loans: list[tuple[Lent, memoryview, int]] = []
        self.number = 0

    def forget(self, buffer: Buffer[int]) -> None:
        self.kept.remove(buffer)

    @rule(length=LENGTHS)
    def take(self, length: int) -> None:
        buffer = self.buffers.take(length)
        assert len(buffer.view) == capacity_of(length)
        assert buffer not in self.busy + self.kept
        self.number += 1
        for edge in (0, len(buffer.view) - 1):
            buffer.view[edge] = self.number % 256
        self.busy.append(buffer)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        buffer = data.draw(st.sampled_from(self.busy))
        self.busy.remove(buffer)
        buffer.owner = self.number % 2
        self.buffers.keep(buffer)
        self.kept.append(buffer)

    @precondition(lambda self: self.busy + self.kept)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        buffer = data.draw(st.sampled_from(self.busy + self.kept))
        edge = data.draw(st.sampled_from([0, len(buffer.view) - 1]))
        view = buffer.view[edge : edge + 1]
        self.loans.append((self.buffers.lend([b"head", view]), view, view[0]))

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        loan = data.draw(st.sampled_from(self.loans))
        self.loans.remove(loan)
        self.buffers.take_back(loan[0])

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        buffer = data.draw(st.sampled_from(self.busy))
        self.busy.remove(buffer)
        self.buffers.release(buffer)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def lend_what_was_just_released(self, data: st.DataObject) -> None:
        view = data.draw(st.sampled_from(self.busy)).view[:1]
        self.release(data)
        self.loans.append((self.buffers.lend([view]), view, view[0]))

    @rule(owner=st.sampled_from([0, 1]))
    def release_of(self, owner: int) -> None:
        self.kept = [buffer for buffer in self.kept if buffer.owner != owner]
        self.buffers.release_of(owner)

    @rule()
    def trim(self) -> None:
        self.buffers.trim()

    @rule(bytes_max=LENGTHS)
    def resize(self, bytes_max: int) -> None:
        self.buffers.resize(bytes_max)

    @invariant()
    def lent_bytes_stay(self) -> None:
        assert [view[0] for _, view, _ in self.loans] == [value for _, _, value in self.loans]

    @invariant()
    def used_bytes_are_counted(self) -> None:
        used = sum(len(buffer.view) for buffer in self.busy + self.kept)
        assert self.buffers.total_bytes >= used

    def teardown(self) -> None:
        for lent, *_ in self.loans:
            self.buffers.take_back(lent)
        for buffer in self.busy:
            self.buffers.release(buffer)
        for owner in (0, 1):
            self.buffers.release_of(owner)
        self.buffers.trim()
        assert self.buffers.total_bytes == 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
