"""Criteria and the generator of random scores."""

import math

import pytest
import torch

from sparse_lightning.policy.criteria import (
    DROP_CRITERIA,
    GATHERED,
    GROW_CRITERIA,
    BlockScores,
    block_magnitudes,
    collect_needs,
    dense_block_norms,
    gradient,
    magnitude,
    momentum,
    movement,
    needs,
    random,
    saliency,
    seeded_generator,
)


def scores(seed: int = 0, shape: tuple[int, int] = (2, 3)) -> BlockScores:
    whole = torch.arange(float(shape[0] * shape[1])).view(shape)
    return BlockScores(
        mask=torch.ones(shape, dtype=torch.bool),
        magnitude=whole,
        generator=seeded_generator(seed, 0, "fc"),
        gathered={name: whole + 10 * i for i, name in enumerate(GATHERED, 1)},
    )


def test_offered_criteria() -> None:
    assert {
        "magnitude": magnitude,
        "gradient": gradient,
        "saliency": saliency,
        "movement": movement,
        "random": random,
    } == DROP_CRITERIA
    assert {
        "gradient": gradient,
        "momentum": momentum,
        "random": random,
        "none": None,
    } == GROW_CRITERIA


@pytest.mark.parametrize(
    ("criterion", "first"),
    [(magnitude, 0), (gradient, 10), (momentum, 20), (saliency, 30), (movement, 40)],
)
def test_gathered_scores_are_returned_unchanged(criterion, first: int) -> None:
    assert criterion(scores()).flatten().tolist() == list(range(first, first + 6))


def test_criteria_declare_their_needs() -> None:
    assert collect_needs([magnitude, random, None]) == frozenset()
    assert collect_needs([saliency, momentum]) == {"saliency", "momentum"}
    assert collect_needs([movement, gradient]) == {"movement", "gradient"}
    assert collect_needs([lambda scores: scores.magnitude]) == frozenset()
    with pytest.raises(ValueError, match=r"'gradient', .*; got 'gradeint'\."):
        needs("gradeint")


def test_an_undeclared_statistic_raises_with_a_remedy() -> None:
    bare = BlockScores(torch.ones(1, 1) > 0, torch.ones(1, 1), seeded_generator(0, 0, ""))
    with pytest.raises(ValueError, match=r"`scores.momentum` must .*@needs\('momentum'\)"):
        momentum(bare)


def test_dense_block_norms_are_those_of_the_blocks() -> None:
    matrix = torch.randn(32, 48, dtype=torch.float64)
    norms = dense_block_norms(matrix, (2, 3))
    assert norms.dtype == torch.float32
    for r in range(2):
        for c in range(3):
            block = matrix[16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
            assert float(norms[r, c]) == pytest.approx(float(block.norm()), rel=1e-6)


def test_random_scores_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = random(scores())
    torch.manual_seed(2)
    assert torch.equal(random(scores()), first)
    assert not torch.equal(random(scores(seed=1)), first)
    assert first.shape == (2, 3) and first.dtype == torch.float32
    many = random(scores(shape=(100, 100)))
    assert many.min() >= 0 and many.max() < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)
    assert len(many.unique()) > 9_900, "so that ties do not choose"


def test_block_magnitudes_by_hand() -> None:
    values = torch.zeros(3, 2, 2)
    values[0] = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    values[2] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert block_magnitudes(values).tolist() == [5, 0, 2]
    assert block_magnitudes(values[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_block_magnitudes_are_computed_in_fp32(dtype: torch.dtype) -> None:
    # The squares sum to 2^22 * 16 * 16 = 2^30, which exceeds fp16's 65504. Adding 1 to 2^11 is
    # below the spacing of bf16 and fp16 there, but not below that of fp32.
    values = torch.full((2, 16, 16), 2048.0, dtype=dtype)
    values[1] = 1.0
    values[1, 0, 0] = 32.0
    norms = block_magnitudes(values)
    assert norms.dtype == torch.float32
    assert norms[0] == 2.0**15
    assert float(norms[1]) == pytest.approx(math.sqrt(1024 + 255), rel=1e-6)


def test_block_magnitudes_are_detached() -> None:
    values = torch.ones(1, 2, 2, requires_grad=True)
    assert not block_magnitudes(values).requires_grad


def draw(seed: int, step: int, layer: str) -> list[float]:
    return torch.rand(4, generator=seeded_generator(seed, step, layer)).tolist()


def test_a_seeded_generator_leaves_the_global_one_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw(0, 100, "fc1")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    torch.rand(7)
    assert draw(0, 100, "fc1") == first


def test_a_seeded_generator_depends_on_each_argument() -> None:
    arguments = [
        (0, 100, "fc1"),
        (1, 100, "fc1"),
        (0, 101, "fc1"),
        (0, 100, "fc2"),
        # The arguments must not be ambiguous when they are joined.
        (1, 11, "fc1"),
        (11, 1, "fc1"),
        (1, 1, "1/fc1"),
        (1, 1, "fc1"),
    ]
    draws = [tuple(draw(*args)) for args in arguments]
    assert len(set(draws)) == len(arguments)


def test_a_seeded_generator_is_the_same_on_every_machine_and_version() -> None:
    """A resumed run draws the same numbers as an uninterrupted one."""
    assert seeded_generator(0, 0, "fc1").initial_seed() == 5929516608418291844
    assert seeded_generator(0, 0, "fc1").device == torch.device("cpu")


def test_random_scores_ignore_the_default_device() -> None:
    """The generator is on the CPU, so the draw must be, whatever the default device is."""
    nothing = torch.zeros(2, 3)
    scores = BlockScores(nothing.bool(), nothing, seeded_generator(0, 1, "layer"))
    with torch.device("meta"):
        drawn = random(scores)
    assert drawn.device.type == "cpu"
    assert drawn.tolist() == torch.rand(2, 3, generator=seeded_generator(0, 1, "layer")).tolist()
