"""Files of safetensors, byte for byte those of its own library."""

import torch
from safetensors.torch import save

from grpo.update.checkpoint import safetensors_file


def test_a_file_in_pieces_is_that_of_the_library() -> None:
    draw = torch.Generator().manual_seed(0)
    types = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    tensors = {
        f"{name}.{number}": (torch.randn(shape, generator=draw) * 4).to(dtype)
        for number, dtype in enumerate(types)
        for name, shape in (("b", (3, 5)), ("a.weight", (7,)), ("one", ()), ("none", (0, 2)))
    }
    assert b"".join(safetensors_file(tensors)) == save(tensors, metadata={"format": "pt"})
    transposed = {"weight": torch.randn(4, 6, generator=draw).T}
    plain = {"weight": transposed["weight"].contiguous()}
    assert b"".join(safetensors_file(transposed)) == save(plain, metadata={"format": "pt"})
    assert b"".join(safetensors_file({})) == save({}, metadata={"format": "pt"})
