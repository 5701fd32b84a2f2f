import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import Codec, row_bytes
from p2pinfer.node.protocol.tensors import check_finite, decode_hidden, dtype_of, encode_hidden

codecs: st.SearchStrategy[Codec] = st.sampled_from(["float32", "bfloat16", "float16"])


@given(codecs, st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_hidden_states_survive_the_wire_to_the_codec_s_precision(
    codec: Codec, tokens: int, hidden_size: int, seed: int
) -> None:
    hidden = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(seed))
    payload = bytearray(encode_hidden(hidden, codec))
    assert len(payload) == tokens * row_bytes(hidden_size, codec)
    assert torch.equal(decode_hidden(payload, tokens, hidden_size, codec), hidden.to(dtype_of(codec)))


def test_a_slice_of_a_batch_is_encoded_alone() -> None:
    batch = torch.arange(12.0).view(3, 4)
    assert encode_hidden(batch[1:2], "float32") == batch[1].numpy().tobytes()
    assert encode_hidden(batch[:, 1:3], "float32") == batch[:, 1:3].contiguous().numpy().tobytes()


@given(codecs, st.integers(0, 4), st.integers(0, 200))
def test_a_payload_of_the_wrong_length_is_a_protocol_violation(codec: Codec, tokens: int, size: int) -> None:
    if size == tokens * row_bytes(8, codec):
        return
    with pytest.raises(ProtocolViolation):
        decode_hidden(bytearray(size), tokens, 8, codec, "mallory")


@given(codecs, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_any_bits_are_judged_as_torch_judges_them(codec: Codec, bits: list[int]) -> None:
    payload = bytearray(b"".join(each.to_bytes(4, "little") for each in bits))
    values = torch.frombuffer(payload, dtype=dtype_of(codec)).double()
    fine = bool((values.isfinite() & (values.abs() < 2.0**127)).all())
    try:
        check_finite(payload, codec)
    except WrongOutput:
        assert not fine
    else:
        assert fine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_never_gets_in(value: float, codec: Codec) -> None:
    hidden = torch.zeros(3, 4)
    hidden[1, 2] = value
    with pytest.raises(WrongOutput) as caught:
        decode_hidden(bytearray(encode_hidden(hidden, codec)), 3, 4, codec, "mallory")
    assert caught.value.peer_id == "mallory"
