"""The store of the teacher's most likely tokens: what is read is what was written, rounded; damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genssd.distill.data.topk_coding import BYTES_PER_ENTRY, SKIP, decode_topk, encode_topk
from genssd.distill.data.topk_store import TopkStore, locate_topk
from genssd.engine.common.errors import InputError
from genssd.kernels.logprob import TopK

TOP = TopK(torch.arange(6).reshape(3, 2), torch.full((3, 2), -1.0))


def draw_topk(tokens: int, k: int, vocabulary: int, *, seed: int, scale: float = 3.0) -> tuple[TopK, torch.Tensor]:
    """The top k of random logits, and all log-probabilities, float32 [tokens, vocabulary]."""
    logits = scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))
    logprob = logits.log_softmax(-1)
    values, ids = logprob.topk(k)
    return TopK(ids, values), logprob


@pytest.mark.parametrize(("tokens", "k", "vocabulary"), [(0, 4, 9), (1, 1, 1), (7, 5, 40), (33, 20, 151_936)])
def test_what_is_read_is_what_was_written(tokens: int, k: int, vocabulary: int) -> None:
    top, _ = draw_topk(tokens, k, vocabulary, seed=k)
    code = encode_topk(top)
    read = decode_topk(code, tokens, k)
    assert read is not None
    assert read.ids.shape == read.logprob.shape == (tokens, k)
    sorted_ids = [
        sorted(zip(ids, p, strict=True)) for ids, p in zip(top.ids.tolist(), top.logprob.half().tolist(), strict=True)
    ]
    assert [
        sorted(zip(ids, p, strict=True)) for ids, p in zip(read.ids.tolist(), read.logprob.tolist(), strict=True)
    ] == sorted_ids
    assert (read.logprob.diff(dim=1) <= 0).all(), "most likely first"
    assert len(code) >= BYTES_PER_ENTRY * tokens * k
    if vocabulary == 151_936:
        assert len(code) < 4.3 * tokens * k


@given(st.lists(st.sets(st.integers(0, 3 * SKIP + 2), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_ids_of_any_distance(ids: list[set[int]]) -> None:
    for edges in ([*ids, {0, SKIP, 2 * SKIP + 1}], [*ids, {SKIP - 1, SKIP, 2 * SKIP}]):
        top = TopK(
            torch.tensor([sorted(row) for row in edges]), torch.tensor([[-1.0, -2.0, -3.0]]).repeat(len(edges), 1)
        )
        read = decode_topk(encode_topk(top), len(edges), 3)
        assert read is not None
        assert read.ids.tolist() == top.ids.tolist()


def test_the_divergence_of_rounded_probabilities_is_within_the_stated_bound() -> None:
    for scale in (0.5, 3.0, 10.0):
        top, logq = draw_topk(200, 64, 64, seed=3, scale=scale)
        read = decode_topk(encode_topk(top), 200, 64)
        assert read is not None
        student = torch.randn(200, 64, generator=torch.Generator().manual_seed(4)).log_softmax(-1).double()
        stored = torch.full((200, 64), -torch.inf).scatter(1, read.ids, read.logprob).double()
        exact, rounded = ((q.exp() * (q - student)).sum(1) for q in (logq.double(), stored))
        entropy = -(logq.double().exp() * logq.double()).sum(1)
        spread = (logq.double().exp() * logq.double().abs() * (logq.double() - student).abs()).sum(1)
        assert ((exact - rounded).abs() <= 2**-11 * (entropy + spread)).all()


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    read = decode_topk(encode_topk(TopK(torch.tensor([[9, 2, 5]]), torch.tensor([[-1.0, -1.0, -2.0]]))), 1, 3)
    assert read is not None
    assert read.ids.tolist() == [[2, 9, 5]]


def test_probabilities_that_float16_cannot_hold() -> None:
    read = decode_topk(encode_topk(TopK(torch.tensor([[1, 2, 3]]), torch.tensor([[0.0, -1e5, -torch.inf]]))), 1, 3)
    assert read is not None
    assert read.logprob.tolist() == [[0.0, -torch.inf, -torch.inf]]


def test_every_damaged_byte_is_found() -> None:
    code = encode_topk(TOP)
    assert decode_topk(code, 3, 2) is not None
    for place in range(len(code)):
        damaged = bytearray(code)
        damaged[place] ^= 1 << place % 8
        assert decode_topk(bytes(damaged), 3, 2) is None
        assert decode_topk(code[:place], 3, 2) is None
    assert decode_topk(code, 3, 3) is None


@pytest.mark.parametrize("logprob", [[[0.5, -1.0]], [[-0.1, -0.1]], [[float("nan"), -1.0]]])
def test_what_is_no_distribution_is_refused(logprob: list[list[float]]) -> None:
    assert decode_topk(encode_topk(TopK(torch.tensor([[1, 2]]), torch.tensor(logprob))), 1, 2) is None


def test_an_id_that_the_teacher_does_not_have_is_named(tmp_path: Path) -> None:
    with TopkStore(tmp_path / "t.bin", 0, vocabulary=13) as store:
        field = store.append(TOP)
    place = locate_topk({**field, "vocabulary": 3}, tmp_path, 3, "here")
    assert place is not None
    with pytest.raises(
        InputError, match=r"here: .*t\.bin is of another teacher: the top k of token 1 has the id 3, which"
    ):
        place.read()


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    with TopkStore(tmp_path / "t.bin", 0, vocabulary=13) as store:
        fields = [store.append(TOP), store.append(TopK(TOP.ids + 7, TOP.logprob * 2))]
    places = [locate_topk(field, tmp_path, 3, "here") for field in fields]
    assert places[0] is not None
    assert places[1] is not None
    assert torch.equal(places[1].read().ids, TOP.ids + 7)
    assert torch.equal(places[0].read().logprob, TOP.logprob)
    second = fields[0]["bytes"]
    assert fields[1]["offset"] == second == 28
    (tmp_path / "t.bin").write_bytes((tmp_path / "t.bin").read_bytes()[:40])
    with pytest.raises(InputError, match=r"here: .* holds no top k at byte 28: it is damaged, or not the file of this"):
        places[1].read()
    with pytest.raises(InputError, match="too few for byte 28"):
        locate_topk(fields[1], tmp_path, 3, "here")
    for content in (bytes(28), b"\xff" * 28):
        (tmp_path / "t.bin").write_bytes(content)
        with pytest.raises(InputError, match="holds no top k at byte 0"):
            places[0].read()
    with pytest.raises(InputError, match="shorter than its rows say"):
        TopkStore(tmp_path / "t.bin", 96, vocabulary=13)


def test_a_field_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with TopkStore(tmp_path / "t.bin", 0, vocabulary=13) as store:
        field = store.append(TOP)
    for change, message in (
        ({"file": "none.bin"}, "cannot be read"),
        ({"file": "n\0.bin"}, "cannot be read"),
        ({"offset": 1 << 70}, "too few"),
        ({"k": 0}, "cannot have k=0"),
        ({"bytes": 20}, "cannot hold 3 x 2 entries in 20 bytes"),
        ({"offset": -1}, "must name file, offset, bytes, tokens, k and vocabulary"),
        ({"tokens": True}, "must name file"),
    ):
        with pytest.raises(InputError, match=f"^here: .*{message}"):
            locate_topk({**field, **change}, tmp_path, 3, "here")
    with pytest.raises(InputError, match="teacher_topk has 3 tokens, the completion 4"):
        locate_topk(field, tmp_path, 4, "here")
    for wrong in ("x", {}):
        with pytest.raises(InputError, match="must name file"):
            locate_topk(wrong, tmp_path, 3, "here")
