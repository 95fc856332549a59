"""Denoising errors -> margin -> loss: the arithmetic of every objective, and nothing else.

Symbols: of a pair, e_w and e_l are the policy's errors on winner and loser, r_w and r_l the
reference's; m = (r_w - r_l) - (e_w - e_l) is the margin and u = beta m / 2 the logit. T and the
weighting of Wallace et al. 2023 (arXiv 2311.12908) are folded into beta; the factor 1/2 is the
published implementation's, so that its betas mean the same here. Errors are means over the latent,
never sums: a beta of code that sums has to be multiplied by the latent's number of values, and one
of code without the 1/2 by 2. With flow-matching models nothing changes: their errors are those of
the velocity, and no noise level weighs more than another. Everything is float32: with beta = 5000 a
logit is 2500 times a difference of errors, and bf16 errors would drown it in noise.

Losses are per pair. A batch's loss is their mean, taken last, never over errors before it.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Confidence: TypeAlias = float | Float[Tensor, " pair"]
"""Probability that the label is right, in [1/2, 1]; of all pairs, or of each."""

MAPO_S = 0.5
"""s of MaPO's score: the published implementation's `snr_value`, one for all timesteps."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Squared denoising error of both images of each pair, averaged over latent pixels; >= 0."""

    winner: Float[Tensor, " pair"]
    loser: Float[Tensor, " pair"]

    def detached(self) -> "Errors":
        """The same errors without their gradient."""
        return Errors(self.winner.detach(), self.loser.detach())


@dataclass(frozen=True, slots=True)
class Compared:
    """The errors and votes of a batch, from which every objective is computed."""

    policy: Errors
    reference: Errors
    """NaN under an objective without a reference."""
    overlap: Float[Tensor, " pair"]
    """The policy's `residual_overlap`."""
    votes: Int[Tensor, " pair"]
    """The winner's lead in votes; below 0 where the votes were overruled."""
    vote_fraction: Float[Tensor, " pair"]
    """The winner's fraction of the votes cast, in [0, 1]; 1 where none was cast."""


def denoising_errors(
    predicted: Float[Tensor, "image channel height width"],
    target: Float[Tensor, "image channel height width"],
) -> Errors:
    """Mean squared error of each image; winners are the first half, losers the second."""
    squared = functional.mse_loss(predicted.float(), target.float(), reduction="none")
    winner, loser = squared.mean(dim=(1, 2, 3)).chunk(2)
    return Errors(winner, loser)


@torch.no_grad()
def residual_overlap(
    predicted: Float[Tensor, "image channel height width"],
    target: Float[Tensor, "image channel height width"],
) -> Float[Tensor, " pair"]:
    """Mean over latent pixels of the winner's residual times the loser's; of either sign.

    Residuals are the gradients of the errors with respect to the predictions, up to one factor:
    this is their inner product, on the scale on which an error is a residual's with itself.
    """
    winner, loser = (predicted.float() - target.float()).chunk(2)
    return (winner * loser).mean(dim=(1, 2, 3))


def margin(policy: Errors, reference: Errors) -> Float[Tensor, " pair"]:
    """How much more the policy improved on winners than on losers; > 0 is what training wants.

    The reference's gap minus the policy's: the bracket of Eq. 14 with its sign turned.
    """
    return (reference.winner - reference.loser) - (policy.winner - policy.loser)


def lead(policy: Errors) -> Float[Tensor, " pair"]:
    """e_l - e_w, the margin of an objective without reference; > 0 is what training wants.

    At the start it is not 0: images differ in how hard they are to denoise.
    """
    return policy.loser - policy.winner


# --- objectives ----------------------------------------------------------------------------------


def dpo_losses(
    policy: Errors, reference: Errors, beta: float, p: Confidence = 1.0
) -> Float[Tensor, " pair"]:
    """Diffusion-DPO: -log sigmoid(u); Wallace et al. 2023, Eq. 14.

    ln 2 where policy and reference agree; smaller where the margin is positive. With labels that
    are right only with probability p it is label-smoothed ("conservative", cDPO: Mitchell 2023, "A
    note on DPO with noisy preferences"; its epsilon is 1 - p):

        -p log sigmoid(u) - (1 - p) log sigmoid(-u) = (1 - p) u - log sigmoid(u).

    Its slope in u is sigmoid(u) - p: it is least at u = log(p / (1 - p)), and beyond that margin
    pairs are pulled back. Still ln 2 where policy and reference agree; at p = 1/2 it teaches
    nothing but to stay there.
    """
    logit = 0.5 * beta * margin(policy, reference)
    return (1 - p) * logit - functional.logsigmoid(logit)


def vote_confidence(vote_fraction: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """P of smoothing by votes: the winner's fraction of the votes cast, in [1/2, 1].

    3 of 4 votes are 3/4, all are 1, and so are labels without votes. A winner that a rule chose
    against the votes has 1/2: less would train against the label.
    """
    return vote_fraction.clamp(min=0.5)


def margin_dpo_losses(
    policy: Errors,
    reference: Errors,
    beta: float,
    votes: Int[Tensor, " pair"],
    mean_votes: float,
    p: Confidence = 1.0,
) -> Float[Tensor, " pair"]:
    """Diffusion-DPO weighted by vote margin: -(|v| / mean |v|) log sigmoid(u).

    v is the winner's lead in votes and `mean_votes` the mean of |v| over all decided pairs of the
    label set. So the mean weight is 1 over the set (not over each batch), and lr and beta mean
    what they mean without weights. A pair whose votes were even, decided by a tie rule, weighs 0.
    """
    return votes.abs() / mean_votes * dpo_losses(policy, reference, beta, p)


def ipo_losses(policy: Errors, reference: Errors, beta: float) -> Float[Tensor, " pair"]:
    """Identity preference optimization: (u - 1/2)^2; Azar et al. 2023 (arXiv 2310.12036).

    Their loss is (h - 1/(2 tau))^2 with h the log ratio of ratios. DPO's logit is tau h, which is u
    here; this is their loss times tau^2, which moves no minimum and keeps gradients of DPO's size.
    1/4 where policy and reference agree; 0 at m = 1 / beta; beyond it the margin is pulled back.
    """
    return (0.5 * beta * margin(policy, reference) - 0.5).square()


def sdpo_losses(
    policy: Errors,
    reference: Errors,
    beta: float,
    overlap: Float[Tensor, " pair"],
    mu: float,
    p: Confidence = 1.0,
) -> Float[Tensor, " pair"]:
    """Diffusion-DPO with the winner-preserving safeguard of Diffusion-SDPO (arXiv 2511.03317).

    The values are DPO's. Only the gradient through e_l is scaled by `loser_scale`, so that a step
    does not raise e_w to first order.
    """
    scale = loser_scale(policy.winner.detach(), overlap, mu)
    fixed = policy.loser.detach()
    loser = fixed + scale * (policy.loser - fixed)  # e_l in value, scale times its gradient
    return dpo_losses(Errors(policy.winner, loser), reference, beta, p)


def loser_scale(
    winner: Float[Tensor, " pair"], overlap: Float[Tensor, " pair"], mu: float
) -> Float[Tensor, " pair"]:
    """The safeguard's lambda: the largest in [0, 1] that leaves winners a fraction mu of progress.

    With d_w and d_l the residuals, a descent step on DPO moves outputs along -(d_w - lambda d_l),
    hence e_w at the rate -(d_w . d_w - lambda d_l . d_w). That this is at most -mu d_w . d_w asks

        lambda <= (1 - mu) (d_w . d_w) / (d_l . d_w)    where d_l . d_w > 0,

    and nothing elsewhere. This is the published output-space form: it takes the network's Jacobians
    at winner and loser as equal. The published code has one lambda a batch; here each pair has its
    own, so that it does not depend on which pairs share a forward pass.
    """
    bound = (1 - mu) * winner / overlap
    return torch.where(overlap > 0, bound, 1.0).clamp(max=1.0)


def linear_dpo_losses(
    policy: Errors, reference: Errors, beta: float, eta: float
) -> Float[Tensor, " pair"]:
    """Linear-DPO: w (e_w - e_l); arXiv 2605.21123 and its code, WhynotChen0105/Linear-DPO.

        w = clamp(0.2 beta ((e_w - e_l) - (r_w - r_l)) + 0.5, eta, 1 - eta)

    has no gradient; in the margin, the bracket with its sign turned, it is 0.5 - 0.2 beta m. It is
    a straight line in place of DPO's factor sigmoid(-u), but for the scale beta / 2 that DPO's
    gradient has besides: pairs the policy has learned weigh less, and at least eta. Where policy
    and reference agree w is 1/2. Its slope in m there, -0.2 beta, is DPO's at 1.6 times this beta
    (-beta' / 8). Unlike DPO's, the loss has no fixed value for "no change" and may be negative.
    """
    weight = (0.5 - 0.2 * beta * margin(policy.detached(), reference)).clamp(eta, 1 - eta)
    return weight * (policy.winner - policy.loser)


def mapo_losses(
    policy: Errors, num_timesteps: int, beta: float, winner_weight: float
) -> Float[Tensor, " pair"]:
    """MaPO, free of a reference: k e_w - beta log sigmoid(T (p(e_w) - p(e_l))); arXiv 2406.06424.

    p(e) = s e / (exp(s e) - 1) is the published score of an error: 1 at 0 and falling. k is
    `winner_weight` (published: 1), T the number of timesteps. Scores of nearby errors differ by
    little and T magnifies it, so they are computed in float64.
    """
    winner, loser = mapo_score(policy.winner), mapo_score(policy.loser)
    preferred = functional.logsigmoid(num_timesteps * (winner - loser)).float()
    return winner_weight * policy.winner - beta * preferred


def anchor_losses(policy: Errors, reference: Errors, weight: float) -> Float[Tensor, " pair"]:
    """Winner anchor, a supervised part to add to an objective: k (e_w - r_w), k being `weight`.

    Pang et al. 2024 (arXiv 2404.19733) add the winner's log likelihood to DPO; here its error takes
    that place. The gradient is that of the denoising loss on winners, k e_w. r_w has none; it makes
    the value 0 where policy and reference agree, so that the sum keeps the objective's value there.
    Below 0 where the policy denoises winners better than the reference does.
    """
    return weight * (policy.winner - reference.winner)


def mapo_score(error: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """p(e) = s e / (exp(s e) - 1), in (0, 1], float64."""
    scaled = (MAPO_S * error.double()).clamp(min=1e-9)  # the limit at 0 is 1, not 0 / 0
    return scaled / torch.expm1(scaled)
