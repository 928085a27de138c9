"""Products of some rows by a large matrix: the same numbers whichever way round they are computed."""

import pytest
import torch

from llama import parallel


@pytest.mark.parametrize("shape", [(15, 1), (16, 1), (4, 5), (1, 24), (32, 1), (33, 1), (2, 3, 4)])
def test_products_are_the_same_either_way_round(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, 256, generator=generator),
        torch.randn(512, 256, generator=generator),
    )
    y = parallel.product(x, weight)
    assert y.is_contiguous() and y.shape == (*shape, 512)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, atol=1e-3, rtol=0)
    whole = parallel.product(x.bfloat16(), weight.bfloat16())
    assert whole.dtype == torch.bfloat16 and whole.shape == y.shape
