"""The loss on an NVIDIA GPU, whose types, products and chunks are others than those of a CPU."""

import pytest
import torch
import torch.nn.functional as F

from xglm_core.loss import LossOptions
from xglm_torch.loss import causal_lm_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

WORDS, WIDTH, SMOOTHING, Z_LOSS = 256_008, 67, 0.1, 1e-3


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-5),  # Sums of up to 256,008 float32 terms, in another order.
        (torch.float32, True, 1e-3),  # Rounded to bfloat16 before the products: each term by 2^-9 at most.
        (torch.bfloat16, False, 6e-3),  # The gradients, too, are bfloat16.
        (torch.float16, False, 1e-3),  # As the gradients of single logits are smaller than float16's least number.
    ],
)
def test_loss_and_gradients(dtype, autocast, tolerance):
    stream = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=stream)

    states, matrix = normal(3, 137, WIDTH).to(dtype), (0.1 * normal(WORDS, WIDTH)).to(dtype)
    labels = torch.randint(0, WORDS, (3, 137), device="cuda", generator=stream)
    labels[0, 5:60] = -100
    given = [states.requires_grad_(), matrix.requires_grad_()]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        options = LossOptions(label_smoothing=SMOOTHING, z_loss=Z_LOSS)
        loss = causal_lm_loss(*given, labels, options=options).loss
    loss.backward()

    factors = torch.bfloat16 if autocast else dtype
    exact = [tensor.detach().to(factors).double().requires_grad_() for tensor in given]
    logits, targets = (exact[0][:, :-1] @ exact[1].T).flatten(0, 1), labels[:, 1:].flatten()
    logits, targets = logits[targets != -100], targets[targets != -100]
    expected = F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
    expected = expected + Z_LOSS * (logits.logsumexp(dim=1) ** 2).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for tensor, reference in zip(given, exact, strict=True):
        error = (tensor.grad.double() - reference.grad).abs().max() / reference.grad.abs().max()
        assert error < tolerance
