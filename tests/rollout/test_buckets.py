import pytest
import torch

from pivotrl.rollout import TensorInfo, tensor_checksum
from pivotrl.rollout.buckets import num_bytes, pack, unpack, verify

torch.manual_seed(0)
WEIGHTS = [
    ("odd", torch.randint(0, 100, (3,), dtype=torch.uint8)),
    ("half", torch.randn(5, 3).bfloat16()),
    ("turned", torch.randn(6, 4).T),
    ("scalar", torch.tensor(2.5, dtype=torch.float64)),
    ("empty", torch.zeros(0, 7)),
    ("large", torch.randn(300)),
    ("last", torch.randn(2, 2, 2)),
]


@pytest.mark.parametrize("max_bytes", [16, 100, 200, 10_000])
def test_what_is_packed_comes_out_again_bit_for_bit(max_bytes):
    buckets = list(pack(iter(WEIGHTS), max_bytes))
    found = [pair for bucket in buckets for pair in unpack(bucket.flat.clone(), bucket.tensors)]
    assert [name for name, _ in found] == [name for name, _ in WEIGHTS]
    for (name, expected), (_, tensor) in zip(WEIGHTS, found, strict=True):
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape and torch.equal(tensor, expected), name
    infos = {info.name: info for bucket in buckets for info in bucket.tensors}
    assert all(
        infos[name].checksum == tensor_checksum(tensor.contiguous()) and infos[name].nbytes == tensor.nbytes for name, tensor in WEIGHTS
    )
    for bucket in buckets:
        verify(bucket.flat, bucket.tensors)
        assert len(bucket.flat) == num_bytes(bucket.tensors)
        assert len(bucket.flat) <= max_bytes or sum(info.nbytes > 0 for info in bucket.tensors) == 1


def test_a_bucket_is_handed_over_before_the_next_tensor_is_read():
    read = []
    buckets = pack(((read.append(name), (name, torch.ones(4)))[1] for name in "abcdef"), 32)
    for number in range(3):
        assert len(next(buckets).tensors) == 2 and len(read) == min(2 * number + 3, 6)


def test_buckets_do_not_change_with_the_tensors_that_they_were_made_of():
    tensor = torch.ones(4)
    (bucket,) = pack([("a", tensor)], 64)
    tensor.zero_()
    verify(bucket.flat, bucket.tensors)
    assert unpack(bucket.flat, bucket.tensors)[0][1].sum() == 4


@pytest.mark.parametrize("at", [0, 17, 40])
def test_one_wrong_bit_is_found_and_its_tensor_named(at):
    (bucket,) = pack([("first", torch.ones(4)), ("second", torch.ones(8))], 64)
    bucket.flat[at] ^= 4
    with pytest.raises(ValueError, match=f"weights refused: checksum of {'first' if at < 16 else 'second'} differs"):
        verify(bucket.flat, bucket.tensors)


def test_a_name_that_comes_twice_is_refused_even_buckets_later():
    with pytest.raises(ValueError, match="'a' came twice"):
        list(pack([("a", torch.ones(4)), ("b", torch.ones(4)), ("a", torch.ones(4))], 16))


def test_sizes_follow_from_dtype_and_shape():
    assert TensorInfo("w", "bfloat16", (3, 5), 0).nbytes == 30 and TensorInfo("s", "float32", (), 0).nbytes == 4
