"""Probabilities that are never formed where they would lose digits.

A confident token has 1 - p far below the spacing of fp32 at 1, so `1 - p` is not computed from p. Everything follows
from two quantities per token, both differences of logits:

- the log-odds of the label against all other classes, l = x_y / T - logsumexp over j != y of x_j / T, from which
  log p = logsigmoid(l) and log(1 - p) = logsigmoid(-l) to full relative precision at either end;
- the log-probabilities of the other classes among themselves, log p^_j = x_j / T - logsumexp over k != y of x_k / T.

Logits are shifted by their largest (or largest non-label) entry before they are divided by T, so that large logits keep
the digits in which classes differ.
"""

import torch
from torch import Tensor


def at_least_fp32(values: Tensor) -> Tensor:
    """`values` in fp32, or as they are when already fp32 or fp64."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log p at `temperature` [tokens, vocab], at least fp32, of logits [tokens, vocab] of any float dtype."""
    logits = at_least_fp32(logits)
    return ((logits - logits.detach().amax(1, keepdim=True)) / temperature).log_softmax(1)


def label_split(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The softmax at `temperature` as the label's log-odds and the rest's own distribution.

    Args:
        logits: [tokens, vocab], fp32 or fp64
        labels: [tokens], in [0, vocab)

    Returns:
        log-odds of the label [tokens], and log p^ [tokens, vocab] with 0 at the label's entry: the same number for
        every model, so that an elementwise divergence is exactly 0 there.
    """
    label = labels.unsqueeze(1)  # [tokens, 1]
    rest = logits.scatter(1, label, -torch.inf)
    peak = rest.detach().amax(1, keepdim=True)
    scaled = (rest - peak) / temperature
    normaliser = scaled.logsumexp(1, keepdim=True)
    log_odds = (logits.gather(1, label) - peak) / temperature - normaliser
    return log_odds.squeeze(1), (scaled - normaliser).scatter(1, label, 0.0)


def kl_elements(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms of KL(p || q) that are each >= 0 and add up to it: p (e^d - 1 - d) = p log(p / q) - p + q, d = log(q / p).

    The sum equals that of p log(p / q) because p and q both sum to 1, but a rounding error in either normaliser
    enters only in second order, so a student close to its teacher still gets an accurate loss.
    """
    p, d = log_p.exp(), log_q - log_p
    near = p * (torch.expm1(d.clamp(max=1.0)) - d)
    far = log_q.exp() - p - p * d  # e^d could overflow here, while q = p e^d cannot
    return torch.where(d < 1.0, near, far)


def binary_kl(log_odds_p: Tensor, log_odds_q: Tensor) -> Tensor:
    """KL of two-point distributions given by their log-odds, elementwise: [tokens], [tokens] -> [tokens]."""
    logsigmoid = torch.nn.functional.logsigmoid
    return kl_elements(logsigmoid(log_odds_p), logsigmoid(log_odds_q)) + kl_elements(
        logsigmoid(-log_odds_p), logsigmoid(-log_odds_q)
    )
