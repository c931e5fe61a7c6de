"""Losses whose product takes the normalizers of the softmax, through Triton's interpreter, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from support.fake_cuda import FakeCuda, storage_of
from torch import Tensor

from genssd.kernels import head, tune_file, tuned
from genssd.kernels.cross_entropy import compute_cross_entropy, linear_cross_entropy
from genssd.kernels.divergence import compute_divergence, linear_divergence
from genssd.kernels.divergence_terms import DivergenceKind
from genssd.kernels.head_triton import HeadLaunch, HeadTiles
from genssd.kernels.loss_launch_triton import LossConfiguration
from genssd.kernels.loss_logits_triton import write_normalized_logits

TILES = HeadTiles(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=1)
LAUNCH = HeadLaunch(programs=2, tiles=TILES, splits=3, group=2, interpret=True)
FUSED = LossConfiguration(
    tiles=TILES, splits=3, group=2, fused=True, block_entries=256, row_warps=4, programs=3, chunk_rows=20
)
OPTIONS = [(1.0, None), (0.7, 4.0)]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that the launches can ask for its size."""
    properties = SimpleNamespace(multi_processor_count=2, major=9, minor=0, name="card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * (x / softcap).tanh()


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 5), (16, 96, 16), (17, 97, 33), (40, 161, 7)])
@pytest.mark.parametrize(("temperature", "softcap"), OPTIONS)
def test_logits_and_their_normalizers(
    rows: int, vocabulary: int, width: int, temperature: float, softcap: float | None
) -> None:
    hidden, weight = normal(rows, width), normal(vocabulary, width, seed=1)
    out = torch.full((rows, vocabulary + 3), torch.nan)
    normalizer = write_normalized_logits(
        hidden, weight, out[:, :vocabulary], temperature, softcap, launch=LAUNCH
    )  # fmt: skip
    exact = capped(hidden.double() @ weight.double().T, softcap)
    torch.testing.assert_close(out[:, :vocabulary].double(), exact, atol=1e-5, rtol=1e-5)
    assert bool(out[:, vocabulary:].isnan().all()), "nothing is written between the rows"
    torch.testing.assert_close(normalizer.double().sum(1), (exact / temperature).logsumexp(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalizer[:, 0], out[:, :vocabulary].amax(1) / temperature, atol=1e-6, rtol=1e-6)


def test_normalizers_of_values_that_are_not_finite_and_far() -> None:
    hidden, weight = torch.eye(6), torch.zeros(70, 6)
    weight[3, 0], weight[4, 1], weight[:, 2] = torch.nan, torch.inf, 3e38
    weight[:, 3] = -3e38
    weight[:, 4] = 1e4
    # a product with NaN or inf reaches every row: one at a time
    sums = []
    for row in range(6):
        kept = weight.clone()
        kept[:, [column for column in range(6) if column != row]] = 0.0
        out = torch.empty(1, 70)
        sums.append(write_normalized_logits(hidden[row : row + 1], kept, out, 1.0, None, launch=LAUNCH)[0])
    assert bool(torch.stack(sums[:2]).isnan().any(1).all())
    log_70 = torch.tensor(70.0).log()
    for (peak, log_total), value in zip(sums[2:], (3e38, -3e38, 1e4, 0.0), strict=True):
        assert peak == torch.tensor(value)
        torch.testing.assert_close(log_total, log_70)


def test_a_row_has_the_bits_that_it_has_alone() -> None:
    hidden, weight = normal(37, 24), normal(161, 24, seed=1)
    out = torch.empty(37, 161)
    complete = write_normalized_logits(hidden, weight, out, 0.7, 4.0, launch=LAUNCH)
    for row in (0, 15, 16, 36):
        alone = torch.empty(1, 161)
        normalizer = write_normalized_logits(hidden[row : row + 1], weight, alone, 0.7, 4.0, launch=LAUNCH)
        assert torch.equal(normalizer[0], complete[row])
        assert torch.equal(alone[0], out[row])


Compute = Callable[..., tuple[Tensor, ...]]


def assert_as_good_as_torch(compute: Compute, tensors: list[Tensor], options: tuple[Any, ...], row_loss: int) -> None:
    """Against float64, at most a few times the error of the same arithmetic in torch's float32.

    row_loss: index of the losses of the rows among the results.
    """
    narrow = [x.double() if x.is_floating_point() else x for x in tensors]
    exact, plain = compute(*narrow, *options), compute(*tensors, *options)
    fused = compute(*tensors, *options, configuration=FUSED)
    for ours, others, truth in zip(fused, plain, exact, strict=True):
        error = 4 * float((others - truth).abs().max()) + 1e-5 * max(1.0, float(truth.abs().max()))
        assert float((ours - truth).abs().max()) <= error
    assert fused[row_loss].shape == tensors[0].shape[:1]


def weights(rows: int) -> Tensor:
    """Return weights of rows, of which the second and the last are 0."""
    row_weight = normal(rows, seed=9).abs()
    row_weight[1::22] = 0.0
    row_weight[-1] = 0.0
    return row_weight


@pytest.mark.parametrize(("rows", "vocabulary"), [(23, 161), (41, 96)])
@pytest.mark.parametrize(("temperature", "softcap"), OPTIONS)
def test_cross_entropy(rows: int, vocabulary: int, temperature: float, softcap: float | None) -> None:
    hidden, weight, row_weight = normal(rows, 24), normal(vocabulary, 24, seed=1), weights(rows)
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    hidden[1] = torch.nan
    hidden[-1] = torch.inf
    options = (temperature, softcap, True, True)
    assert_as_good_as_torch(compute_cross_entropy, [hidden, weight, target, row_weight], options, 1)


CAPS = {"forward_kl": (3.0, None), "reverse_kl": (None, 5.0)}
PAIRS = [(kind, 161, 161) for kind in get_args(DivergenceKind)] + [("forward_kl", 97, 161), ("reverse_kl", 161, 97)]


@pytest.mark.parametrize(("kind", "student", "teacher"), PAIRS)
def test_divergences(kind: str, student: int, teacher: int) -> None:
    caps = CAPS.get(kind, (None, None))
    rows = 23
    hidden, teacher_hidden = normal(rows, 24), normal(rows, 16, seed=3)
    hidden[1], teacher_hidden[-1] = torch.nan, torch.inf
    heads = [normal(student, 24, seed=1), normal(teacher, 16, seed=4)]
    runs = ([0.1, 0.4], [9, rows - 9]) if kind.startswith("skew") else ([0.3], [rows])
    options = (kind, *runs, 0.8, *caps, True, True)
    tensors = [hidden, heads[0], teacher_hidden, heads[1], weights(rows)]
    assert_as_good_as_torch(compute_divergence, tensors, options, 1)


def test_gradients_in_half_precision() -> None:
    hidden, weight = normal(21, 24).half(), normal(97, 24, seed=1).half()
    target = torch.arange(21)
    ones = torch.ones(21)
    fused = compute_cross_entropy(
        hidden, weight, target, ones, 1.0, None, True, True,
        configuration=dataclasses.replace(FUSED, chunk_rows=1 << 30),
    )  # fmt: skip
    exact = compute_cross_entropy(hidden.double(), weight.double(), target, ones.double(), 1.0, None, True, True)
    assert fused[2].dtype == torch.float16
    assert fused[3].dtype == torch.float32
    torch.testing.assert_close(fused[1].double(), exact[1], atol=1e-5, rtol=1e-5)
    for ours, truth in zip(fused[2:], exact[2:], strict=True):
        torch.testing.assert_close(ours.double(), truth, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("side", [0, 1])
def test_a_divergence_of_which_one_head_takes_the_library(side: int) -> None:
    """Each side is capped once, and its first read is left out or not, whatever the other side takes."""
    rows = 5
    tensors = [normal(rows, 8), normal(97, 8, seed=1), normal(rows, 8, seed=2), normal(97, 8, seed=3)]
    tensors[2 * side + 1] = tensors[2 * side + 1].T.contiguous().T
    options = ("forward_kl", [0.0], [rows], 0.8, 1.5, 2.0, True, True)
    assert_as_good_as_torch(compute_divergence, [*tensors, torch.ones(rows)], options, 1)


@pytest.fixture
def tuned_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A tune file that holds the product which takes normalizers for the losses of `test_the_operators_on_a_device`."""
    path = tmp_path / "tune.json"
    monkeypatch.setenv(tune_file.FILE_VARIABLE, str(path))
    entry = tune_file.Entry(deterministic=(FUSED.values(),) * 4, fastest=(FUSED.values(),) * 4)
    tuned.card_of.cache_clear()
    with FakeCuda():
        card = tuned.card_of(torch.device("cuda", 0))
    shapes: list[tuple[tune_file.Operator, tuple[int, ...]]] = [
        ("cross_entropy", (161, 16)),
        ("divergence", (97, 16, 8)),
    ]
    for operator, shape in shapes:
        problem = tune_file.Problem(operator=operator, dtype="float32", shape=shape)
        tune_file.add_entries(path, card, {problem: entry})
    tuned.forget()
    yield
    tuned.card_of.cache_clear()
    tuned.forget()


@pytest.mark.parametrize("name", ["cross_entropy", "divergence"])
def test_the_operators_on_a_device(name: str, tuned_losses: None) -> None:
    """Through the dispatcher: no result shares storage, no tensor lies elsewhere, and the values are the CPU's."""
    wanted = {"_write_kernel", "_merge_kernel"}
    row_weight, target = weights(23), torch.arange(23)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor) -> head.HeadLoss:
        if name == "cross_entropy":
            return linear_cross_entropy(
                hidden, weight, target.to(hidden.device), row_weight=row_weight.to(hidden.device), softcap=9.0
            )
        teacher_weight = normal(97, 8, seed=3).to(hidden.device)
        return linear_divergence(
            hidden, weight, teacher, teacher_weight, kind="jsd", row_weight=row_weight.to(hidden.device),
            temperature=1.5, vocabulary="drop",
        )  # fmt: skip

    def run(device: str) -> list[Tensor]:
        leaves = [normal(23, 16).to(device).requires_grad_(), normal(161, 16, seed=1).to(device).requires_grad_()]
        value = loss(*leaves, normal(23, 8, seed=2).to(device))
        return [value.rows, *torch.autograd.grad(value.total, leaves)]

    expected = run("cpu")
    with FakeCuda() as fake:
        results = run("cuda:0")
        assert len({storage_of(result) for result in results}) == 3
        results = [result.detach().cpu() for result in results]
    assert wanted <= fake.kernels
    torch.testing.assert_close(results, [value.detach() for value in expected], atol=1e-5, rtol=1e-4)


def test_a_loss_without_gradients_takes_no_such_product(tuned_losses: None) -> None:
    with FakeCuda() as fake, torch.no_grad():
        hidden, weight = normal(3, 16).to("cuda:0"), normal(161, 16, seed=1).to("cuda:0")
        linear_cross_entropy(hidden, weight, torch.arange(3).to("cuda:0"))
    assert "_write_kernel" not in fake.kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_warps": 3}, "row_warps must be a power of two"),
        ({"block_entries": 100}, "block_entries must be a power of two"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"fused": 1}, "fused must be true or false"),
        ({"rows": 1}, "it must have block_n"),
    ],
)
def test_values_that_no_launch_takes_are_refused(change: dict[str, int], message: str) -> None:
    assert LossConfiguration.from_values(FUSED.values()) == FUSED
    with pytest.raises(ValueError, match=message):
        LossConfiguration.from_values({**FUSED.values(), **change})


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_layout_that_tiles_do_not_read_takes_the_library(descriptors: bool) -> None:
    """Descriptors need rows that begin at 16 bytes, pointers entries that follow each other."""
    tiles = dataclasses.replace(TILES, descriptors=descriptors)
    multiply = dataclasses.replace(FUSED, tiles=tiles).make_multiply(1.0, None)
    hidden, out = normal(3, 5), torch.empty(3, 7)
    weight = normal(7, 5, seed=1) if descriptors else normal(5, 7, seed=1).T
    logits = multiply(hidden, weight, out)
    assert logits.normalizer_C2 is None
    torch.testing.assert_close(logits.x, hidden @ weight.T)
