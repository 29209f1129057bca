"""The bank: whatever the ranks are, a task's tensors stand in its row and neutral values around."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.merge.backbone import Identity
from utune_deploy.merge.bank import fill_row, require_mixable, stack
from utune_deploy.merge.delta import Delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.methods import head_branch
from utune_deploy.merge.no_class import NO_CLASS
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.tuner import Branch, Point, bind
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.prefix import MASKED, Prefix
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation

IDENTITY = Identity("vit", {}, "0" * 64)
CHANNELS = {"a": 4, "b": 6}


def at(module: str, tap: str, add: str) -> tuple[Point, Point]:
    return Point(module, tap), Point(module, add)


KINDS = [
    Branch(tuner, *at(module, *sides))
    for module in CHANNELS
    for tuner, sides in (
        (Bottleneck("identity", bias=False), ("input", "output")),
        (Bottleneck("relu", bias=True), ("input", "output")),
        (Bottleneck("relu", bias=True), ("output", "output")),
        (Prefix(joint_softmax=True), ("keys", "keys")),
        (Prefix(joint_softmax=False), ("keys", "keys")),
        (Bias(), ("output", "output")),
        (Gain(shift=True), ("input", "input")),
        (Norm(1e-6), ("input", "output")),
        (Rotation(1, 2), ("input", "input")),
        (Kronecker(2, 2), ("input", "output")),
        (Bottleneck("relu", bias=False, norm="out"), ("input", "output")),
        (Bypass(2, "relu"), ("input", "output")),
        (Prompt(), ("tokens", "tokens")),
        (Prompt(joint_softmax=False), ("tokens", "tokens")),
    )
]


def build(task: str, listed: list[tuple[Branch, int]], classes: int, seed: int = 0) -> Delta:
    """A delta with these branches and ranks, in this order, with a head in the end."""
    generator = torch.Generator().manual_seed(seed)
    where, head = head_branch("head")
    branches = {f"{b.add.module}/{i}": b for i, (b, _) in enumerate(listed)} | {where: head}
    ranks = [rank for _, rank in listed] + [classes]
    tensors = {}
    for (name, branch), rank in zip(branches.items(), ranks, strict=True):
        channels = CHANNELS.get(branch.add.module, 8)
        sizes = {"in": channels, "out": channels, "r": rank, "c": channels // 2, "d": channels // 2}
        tensors[name] = {
            key: torch.randn(
                [axis if isinstance(axis, int) else sizes[axis] for axis in axes],
                generator=generator,
            )
            for key, axes in branch.tuner.shapes.items()
        }
    labels = tuple(f"{task}{i}" for i in range(classes))
    return Delta(task, labels, Preprocessing((8, 8)), IDENTITY, branches, tensors)


one = st.tuples(st.sampled_from(KINDS), st.integers(1, 5))
many = st.lists(
    st.tuples(st.lists(one, max_size=6), st.integers(1, 6), st.integers(0, 99)),
    min_size=1,
    max_size=5,
)
QUICK = settings(deadline=None, derandomize=True, max_examples=150)


def deltas_of(drawn) -> list[Delta]:
    return [build(f"t{i}", *rest) for i, rest in enumerate(drawn)]


def assigned(bank, delta) -> dict[str, str]:
    """Which slot holds which branch, found by its numbers alone."""
    found = {}
    for name, branch in delta.branches.items():
        settled = branch.tuner.settle(delta.tensors[name])
        row = bank.tasks.index(delta.task)
        hits = [
            slot.name
            for slot in bank.slots
            if slot.branch == branch
            and all(
                torch.equal(
                    bank.tensors[f"{slot.name}/{key}"][row][tuple(map(slice, value.shape))], value
                )
                for key, value in settled.items()
            )
        ]
        assert hits, f"{name} is nowhere in the bank"
        found[name] = hits[0]
    return found


@QUICK
@given(many)
def test_every_task_stands_in_its_row(drawn):
    deltas = deltas_of(drawn)
    bank = stack(deltas)
    assert bank.tasks == tuple(delta.task for delta in deltas)
    assert len({slot.name for slot in bank.slots}) == len(bank.slots)
    order = {slot.name: number for number, slot in enumerate(bank.slots)}
    wanted = {f"{s.name}/{key}" for s in bank.slots for key in s.branch.tuner.served}
    assert set(bank.tensors) == wanted
    for row, delta in enumerate(deltas):
        slots = assigned(bank, delta)
        assert len(set(slots.values())) == len(slots), "two branches share a slot"
        by_point: dict[Point, list[int]] = {}
        for name, branch in delta.branches.items():
            by_point.setdefault(branch.add, []).append(order[slots[name]])
        for places in by_point.values():
            assert places == sorted(places), "branches at one point changed their order"
        of_slot = {slot: name for name, slot in slots.items()}
        for slot in bank.slots:
            fill = slot.branch.tuner.fill
            stored = of_slot.get(slot.name)
            settled = slot.branch.tuner.settle(delta.tensors[stored]) if stored else {}
            for key in slot.branch.tuner.served:
                tensor = bank.tensors[f"{slot.name}/{key}"]
                assert tensor.shape == (len(deltas), *slot.shape(key))
                expected = torch.full(slot.shape(key), fill.get(key, 0.0))
                if stored:
                    expected[tuple(map(slice, settled[key].shape))] = settled[key]
                assert torch.equal(tensor[row], expected)


@QUICK
@given(many)
def test_slots_are_as_large_as_their_largest_task_and_no_larger(drawn):
    deltas = deltas_of(drawn)
    bank = stack(deltas)
    for slot in bank.slots:
        if "r" not in slot.sizes:
            continue
        ranks = [
            bind(d.branches[name].tuner.shapes, d.tensors[name], where=name)["r"]
            for d in deltas
            for name, taken in assigned(bank, d).items()
            if taken == slot.name
        ]
        assert max(ranks) == slot.sizes["r"]


@QUICK
@given(many)
def test_a_row_filled_later_is_the_row_that_was_stacked(drawn):
    deltas = deltas_of(drawn)
    bank = stack(deltas)
    for row, delta in enumerate(deltas):
        filled = fill_row(bank.slots, delta)
        assert set(filled) == set(bank.tensors)
        for name, tensor in filled.items():
            assert torch.equal(tensor, bank.tensors[name][row])


def test_tasks_of_one_method_share_their_slots():
    deltas = [build(f"t{rank}", [(b, rank) for b in KINDS], rank, rank) for rank in (2, 5, 3)]
    bank = stack(deltas)
    assert len(bank.slots) == len(KINDS) + 1
    assert all(slot.sizes.get("r", 5) == 5 for slot in bank.slots)


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 9)], ids=lambda r: f"{r}"
)
def test_the_ranks_of_bottlenecks_are_padded_to_those_of_kernels(rank: int, padded: int):
    bottleneck, keys = KINDS[1], KINDS[3]
    delta = build("a", [(bottleneck, rank), (keys, 3)], classes=5)
    bank, plain = stack([delta], ranks=(4, 8)), stack([delta])
    sizes = {slot.branch.tuner.kind: slot.sizes["r"] for slot in bank.slots}
    assert sizes == {"bottleneck": padded, "prefix": 3, "head": 5}  # keys and classes are no ranks
    for name, tensor in plain.tensors.items():
        inner = tuple(map(slice, tensor.shape))
        assert torch.equal(bank.tensors[name][inner], tensor)
        assert bank.tensors[name].count_nonzero() == tensor.count_nonzero()  # zeros around it


def test_neutral_values():
    """Zero weights, keys that the softmax never sees, classes that never win."""
    joint = KINDS[3]
    small, large = build("small", [(joint, 2)], 2), build("large", [(joint, 4), (KINDS[0], 3)], 5)
    bank = stack([small, large])
    prefix, head, lora = (slot.name for slot in bank.slots)
    assert bank.tensors[f"{prefix}/mask"].tolist() == [[0, 0, MASKED, MASKED], [0] * 4]
    assert bank.tensors[f"{prefix}/key"][0, 2:].count_nonzero() == 0
    assert bank.tensors[f"{head}/bias"][0, 2:].tolist() == [NO_CLASS] * 3
    assert bank.tensors[f"{lora}/up"][0].count_nonzero() == 0
    assert bank.tensors[f"{lora}/up"][1].count_nonzero() > 0


def test_settings_and_places_keep_slots_apart():
    """Another activation, softmax, tap or module is another slot."""
    bank = stack([build(f"t{i}", [(branch, 2)], 2) for i, branch in enumerate(KINDS)])
    assert len(bank.slots) == len(KINDS) + 1


def test_the_type_is_the_heads():
    delta = build("t", [(KINDS[0], 2), (KINDS[3], 2)], 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {b: {n: t.to(dtype) for n, t in w.items()} for b, w in delta.tensors.items()}
        bank = stack([replace(delta, tensors=tensors)])
        assert {t.dtype for t in bank.tensors.values()} == {dtype}
        assert all(t.isfinite().all() for t in bank.tensors.values())
        wide = build("u", [(KINDS[3], 4)], 5)
        tensors = {b: {n: t.to(dtype) for n, t in w.items()} for b, w in wide.tensors.items()}
        bank = stack(
            [replace(delta, tensors=bank_of(delta, dtype)), replace(wide, tensors=tensors)]
        )
        assert all(t.isfinite().all() for t in bank.tensors.values())


def bank_of(delta: Delta, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    return {b: {n: t.to(dtype) for n, t in w.items()} for b, w in delta.tensors.items()}


def test_refusals():
    first = build("a", [(KINDS[0], 2)], 2)
    with pytest.raises(UsageError, match="there is no task"):
        stack([])
    with pytest.raises(UsageError, match="one task name") as caught:
        stack([first, first])
    assert caught.value.details["found"] == "a"
    other = replace(first, task="b", backbone=replace(IDENTITY, fingerprint="1" * 64))
    with pytest.raises(IncompatibleArtefact, match="different backbones"):
        stack([first, other])
    wide = build("b", [(KINDS[0], 2)], 2)
    name = next(iter(wide.branches))
    tensors = {"down": torch.ones(2, 9), "up": torch.ones(4, 2), "scale": torch.ones(())}
    with pytest.raises(IncompatibleArtefact, match="disagree about the channels") as caught:
        stack([first, replace(wide, tensors={**wide.tensors, name: tensors})])
    assert caught.value.details["wanted"] == "in=4"
    difference = Branch(Difference("weight", (4, 4)), *at("a", "weights", "weights"))
    full = build("b", [(difference, 0)], 2)
    assert stack([full]).tensors.keys() == {
        f"{s.name}/{n}" for s in stack([full]).slots for n in s.branch.tuner.served
    }
    for listed in ([first, full], [full, first]):
        with pytest.raises(UsageError, match="task b cannot share a batch") as caught:
            stack(listed)
        assert caught.value.exit_code == 2
        assert "the whole weights of its op" in caught.value.details["found"]
    with pytest.raises(UsageError, match="cannot share a batch"):
        require_mixable(full)
    require_mixable(first)


def test_a_task_that_the_bank_has_no_room_for():
    bank = stack([build("a", [(KINDS[0], 3), (KINDS[3], 2)], 4)])
    fill_row(bank.slots, build("b", [(KINDS[0], 1)], 2))
    for listed, classes, sentence in (
        ([(KINDS[1], 1)], 2, "no slot for a branch"),
        ([(KINDS[0], 1), (KINDS[0], 1)], 2, "no slot for a branch"),
        ([(KINDS[0], 4)], 2, "larger than its slot"),
        ([(KINDS[3], 3)], 2, "larger than its slot"),
        ([], 5, "larger than its slot"),
    ):
        with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
            fill_row(bank.slots, build("b", listed, classes))
        assert caught.value.exit_code == 4
        assert "export the bundle again" in caught.value.details["do"]
