"""
What is there for speed or size alone changes no number: to the bit where the same sums are made, else to rounding.
"""
import pytest
import torch
from einops import rearrange

from model import apply_projection, four_copies

# ------------------------------------------------------------------------------------------------------------- Cameras


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])  # bf16: one step at 8
@pytest.mark.parametrize("frames, d", [(0, 32), (3, 32), (3, 56), (3, 20)])
def test_four_copies_of_a_projection_do_as_one(frames, d, dtype, atol):
    torch.manual_seed(0)
    x, P = torch.randn(2, frames, 6, d).to(dtype), torch.randn(2, frames, 4, 4)
    vectors = rearrange(x.double(), "b f s (g j) -> b f s g j 1", j=4)
    exact = rearrange(P.double()[:, :, None, None] @ vectors, "b f s g i 1 -> b f s (g i)")
    for matrix in (P, four_copies(P, d)):
        torch.testing.assert_close(apply_projection(x, matrix), exact.to(dtype), atol=atol, rtol=0)
    grads = []
    for matrix in (P, four_copies(P, d)):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(apply_projection(leaf, matrix).float().square().sum(), leaf)
    torch.testing.assert_close(*grads, atol=10 * atol, rtol=1e-2)
