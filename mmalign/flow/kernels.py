"""One transition of a flow sampler, from time `t` to `s < t`, as pure functions.

Every kernel is Gaussian with mean `(1 - s) x0 + m e` and standard deviation `q` in every element, where
`x0 = x - t v` and `e = x + (1 - t) v` are the clean latent and the noise that the velocity `v` predicts. With `m = s`
and `q = 0` this is the Euler step of the probability-flow ODE, `x - (t - s) v`; the mean is computed as that step plus
`(m - s) e`, so that zero noise gives the ODE's numbers to the bit.

| kernel      | noise parameter        | m                     | q                                           |
|-------------|------------------------|-----------------------|---------------------------------------------|
| `ode`       |                        | s                     | 0                                           |
| `flow_sde`  | `a`                    | s - g^2 h / 2t        | g sqrt(h), g = a sqrt(t / (1 - t))          |
| `dance_sde` | `eta`                  | s - g^2 h / 2t        | g sqrt(h), g = eta                          |
| `scheduled` | `g`                    | s - g^2 h / 2t        | g sqrt(h)                                   |
| `cps`       | `eta` in [0, 1]        | sqrt(s^2 - q^2)       | s sin(eta pi / 2)                           |
| `ddim`      | `eta` in [0, 1]        | sqrt(s^2 - q^2)       | eta s sqrt(1 - (s (1 - t) / (t (1 - s)))^2) |

with `h = t - s`. The first three discretise an SDE whose marginals are the flow's own, and converge to the data law as
steps shrink, `ddim` too. `cps` does not: its noise does not shrink with `h`, so it keeps the noise level right at every
step and still ends under-dispersed (about 0.80 of the true standard deviation at eta = 0.8, however many steps).

`x, v` are `[N, C, h, w]`; `t, s` and the noise parameter are scalars or `[N]`; all are taken to float32.

`mmalign.sampling.kernels` has the ones that a config can name.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Step = tuple[Float[Tensor, "N C h w"], Float[Tensor, "N"]]  # mean, standard deviation
Scalars = Float[Tensor, "N"] | Float[Tensor, ""] | float


def _column(value: Scalars, x: Tensor) -> Float[Tensor, "N"]:
    return torch.as_tensor(value, dtype=torch.float32, device=x.device).expand(len(x))


def _times(x: Tensor, t: Scalars, s: Scalars) -> tuple[Tensor, Tensor]:
    t, s = _column(t, x), _column(s, x)
    if not bool((s < t).all()):
        worst = int((s - t).argmax())
        raise ValueError(f"a step must go from t to a smaller s, got t={float(t[worst]):.4g}, s={float(s[worst]):.4g}")
    return t, s


def _step(x: Tensor, v: Tensor, t: Tensor, s: Tensor, shortfall: Tensor, std: Tensor) -> Step:
    """The Euler step, less `shortfall = s - m` of the predicted noise."""
    x, v = x.float(), v.float()
    t4, h4, less = (a[:, None, None, None] for a in (t, t - s, shortfall))
    return x - h4 * v - less * (x + (1 - t4) * v), std


def clean(x: Float[Tensor, "N C h w"], v: Float[Tensor, "N C h w"], t: Scalars) -> Float[Tensor, "N C h w"]:
    """The clean latent that velocity `v` predicts: `x0 = x - t v`."""
    return x.float() - _column(t, x)[:, None, None, None] * v.float()


def ode(x, v, t: Scalars, s: Scalars) -> Step:
    """Euler step of the probability-flow ODE: `x - (t - s) v`, standard deviation 0."""
    t, s = _times(x, t, s)
    return _step(x, v, t, s, torch.zeros_like(t), torch.zeros_like(t))


def scheduled(x, v, t: Scalars, s: Scalars, g: Scalars) -> Step:
    """The Euler-Maruyama step of Flow-GRPO's SDE (arXiv 2505.05470, eq. 8) with a free noise level `g` per step:

        mean = x - h [v + g^2 / (2t) (x + (1 - t) v)],   std = g sqrt(h)

    DenseGRPO (arXiv 2601.20218) fits g.
    """
    t, s = _times(x, t, s)
    variance = _column(g, x) ** 2 * (t - s)
    return _step(x, v, t, s, variance / (2 * t), variance.sqrt())


def flow_sde(x, v, t: Scalars, s: Scalars, a: Scalars, t_max: float) -> Step:
    """Flow-GRPO's step (arXiv 2505.05470, eq. 9): `g = a sqrt(t / (1 - min(t, t_max)))`.

    The bound keeps g finite at t = 1; with `t_max` the second time of the schedule it is the clamp of the released
    code.
    """
    t, s = _times(x, t, s)
    g = _column(a, x) * (t / (1 - t.clamp(max=t_max))).sqrt()
    return scheduled(x, v, t, s, g)


def dance_sde(x, v, t: Scalars, s: Scalars, eta: Scalars) -> Step:
    """DanceGRPO's step (arXiv 2505.07818): constant `g = eta`."""
    return scheduled(x, v, t, s, eta)


def _preserving(x, v, t: Tensor, s: Tensor, std: Tensor) -> Step:
    """`m = sqrt(s^2 - q^2)`: the noise level after the step is exactly s. `s - m` without cancellation."""
    m = (s**2 - std**2).clamp(min=0).sqrt()
    return _step(x, v, t, s, std**2 / (s + m).clamp(min=torch.finfo(torch.float32).tiny), std)


def cps(x, v, t: Scalars, s: Scalars, eta: Scalars) -> Step:
    """Coefficients-preserving step (Flow-CPS, arXiv 2509.05952): `q = s sin(eta pi / 2)`."""
    t, s = _times(x, t, s)
    return _preserving(x, v, t, s, s * torch.sin(_column(eta, x) * (math.pi / 2)))


def ddim(x, v, t: Scalars, s: Scalars, eta: Scalars) -> Step:
    """Stochastic DDIM for the linear path (DiffusionNFT, arXiv 2509.16117, appendix). At t = 1 and eta = 1 it restarts
    from fresh noise of level s around the predicted clean latent."""
    t, s = _times(x, t, s)
    ratio = s * (1 - t) / (t * (1 - s)).clamp(min=torch.finfo(torch.float32).tiny)
    return _preserving(x, v, t, s, _column(eta, x) * s * (1 - ratio**2).clamp(min=0).sqrt())


def levels(noise: float | Sequence[float], steps: int) -> list[float]:
    """The noise parameter of each step. ValueError unless there is one number, or one for each."""
    each = [float(noise)] * steps if isinstance(noise, int | float) else [float(level) for level in noise]
    if len(each) != steps:
        raise ValueError(f"{len(each)} noise levels for {steps} steps")
    return each


class Euler:
    """The ODE step, as a kernel without noise."""

    noise = 0.0

    def step(self, x, v, t: Scalars, s: Scalars, noise: Scalars, t_max: float) -> Step:
        return ode(x, v, t, s)


def log_density(y: Float[Tensor, "N C h w"], mean: Float[Tensor, "N C h w"], std: Scalars) -> Float[Tensor, "N h w"]:
    """Log-density of `y` under the step, in nats per latent element: the mean over C of the elementwise Gaussian.

    Its mean over h, w is the reduction published clip ranges refer to. Refuses a deterministic step.
    """
    std = _column(std, mean)
    if not bool((std > 0).all()):
        raise ValueError("a deterministic step (standard deviation 0) has no log-density")
    std = std[:, None, None, None]
    return (-((y.float() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean(1)


def log_ratio(
    y: Float[Tensor, "N C h w"], new: Float[Tensor, "N C h w"], old: Float[Tensor, "N C h w"], std: Scalars
) -> Float[Tensor, "N h w"]:
    """Log of the density of `y` under mean `new` less that under mean `old`, in nats per latent element (mean over C).

    With `d = new - old` it is `d (y - old) / q^2 - d^2 / 2q^2`, which is exactly 0 where nothing changed and keeps its
    digits where little did. The difference of two log-densities loses them at the clip ranges in use (1e-6 to 1e-4).
    """
    std = _column(std, new)
    if not bool((std > 0).all()):
        raise ValueError("a deterministic step (standard deviation 0) has no density")
    d, variance = new - old, std[:, None, None, None] ** 2
    return ((d * (y.float() - old) - d**2 / 2) / variance).mean(1)


def gaussian_kl(
    mean: Float[Tensor, "N C h w"], other: Float[Tensor, "N C h w"], std: Scalars
) -> Float[Tensor, "N h w"]:
    """KL divergence between two steps of equal standard deviation, in nats per latent element (mean over C).

    With `q^2 = g^2 h` as variance, not `g^2` as in the code some published weights `beta` were tuned with: there the
    same number means about ten times less.
    """
    return ((mean - other) ** 2 / (2 * _column(std, mean)[:, None, None, None] ** 2)).mean(1)
