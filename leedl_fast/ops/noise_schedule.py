r"""The noise schedule of a diffusion model, and the per-sample coefficients of its steps.

With betas beta_t, alphas_cumprod abar_t = prod_{s <= t} (1 - beta_s) and model outputs of one of
three kinds,

    epsilon        model_output = noise
    v_prediction   model_output = sqrt(abar) noise - sqrt(1 - abar) sample   (Salimans and Ho 2022)
    sample         model_output = the clean sample

the clean sample is x0 = p x_t + q model_output and the noise is r x_t + o model_output. Every
coefficient is made in float64 and rounded once, in the kernel.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from leedl_fast.ops import checks

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_large")
Timesteps = int | Tensor


class NoiseSchedule:
    """A variance schedule beta_0 ... beta_{T-1} (Ho et al. 2020, section 2; timesteps count from
    0).

    Args:
        betas: (T,) numbers in (0, 1], any floating dtype; kept in float64.

    Raises:
        ValueError: betas is empty, not one-dimensional, or leaves (0, 1].
    """

    def __init__(self, betas: Tensor) -> None:
        checks.check_tensor("betas", betas)
        if betas.dim() != 1 or betas.numel() == 0:
            raise ValueError(f"betas must have shape (T,) with T >= 1, got {tuple(betas.shape)}")
        betas = betas.detach().to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                f"betas must lie in (0, 1], got {betas.min().item()} to {betas.max().item()}"
            )
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        clean = torch.ones(1, dtype=torch.float64)
        self._abar_from_minus_one = torch.cat([clean, self.alphas_cumprod])
        self._tables: dict[tuple, Tensor] = {}

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Betas that grow linearly (Ho et al. 2020, section 4)."""
        _check_num_timesteps(num_timesteps)
        return cls(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Betas whose square roots grow linearly (Rombach et al. 2022)."""
        _check_num_timesteps(num_timesteps)
        roots = math.sqrt(beta_start), math.sqrt(beta_end)
        return cls(torch.linspace(*roots, num_timesteps, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, max_beta: float = 0.999) -> "NoiseSchedule":
        """alphas_cumprod follows a squared cosine (Nichol and Dhariwal 2021, equation 17)."""
        _check_num_timesteps(num_timesteps)
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=max_beta))

    @property
    def num_timesteps(self) -> int:
        return self.betas.numel()

    def __repr__(self) -> str:
        return f"NoiseSchedule(num_timesteps={self.num_timesteps})"

    def add_noise_coefficients(
        self, timesteps: Timesteps, batch: int, device: torch.device
    ) -> Tensor:
        """(batch, 2) float64: x_t = c0 sample + c1 noise (Ho et al. 2020, equation 4)."""
        return self._rows(("add_noise",), timesteps, batch, device)

    def target_coefficients(
        self, timesteps: Timesteps, prediction_type: str, batch: int, device: torch.device
    ) -> Tensor:
        """(batch, 2) float64: what the model should output is c0 sample + c1 noise."""
        checks.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        return self._rows(("target", prediction_type), timesteps, batch, device)

    def ddpm_coefficients(
        self,
        timesteps: Timesteps,
        prev_timesteps: Timesteps | None,
        prediction_type: str,
        variance: str,
        batch: int,
        device: torch.device,
    ) -> Tensor:
        """(batch, 6) float64: p, q, u, w, e, s of an ancestral step (Ho et al. 2020, equations 6
        and 7).

        x0 = p x_t + q model_output; prev_sample = u x0 + w x_t + e model_output + s noise.
        """
        checks.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        checks.check_choice("variance", variance, VARIANCES)
        key = ("ddpm", prediction_type, variance)
        return self._rows(key, timesteps, batch, device, prev_timesteps)

    def ddim_coefficients(
        self,
        timesteps: Timesteps,
        prev_timesteps: Timesteps | None,
        prediction_type: str,
        eta: float,
        batch: int,
        device: torch.device,
    ) -> Tensor:
        """(batch, 6) float64: p, q, u, w, e, s of an implicit step (Song et al. 2021, equations 12
        and 16).
        """
        checks.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        checks.check_finite("eta", eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        key = ("ddim", prediction_type, float(eta))
        return self._rows(key, timesteps, batch, device, prev_timesteps)

    def _rows(
        self,
        key: tuple,
        timesteps: Timesteps,
        batch: int,
        device: torch.device,
        prev_timesteps: Timesteps | None = None,
    ) -> Tensor:
        """The rows of the coefficients `key` at (timesteps, prev_timesteps), one per sample."""
        t = timestep_vector("timesteps", timesteps, batch, device, 0, self.num_timesteps - 1)
        if prev_timesteps is None:
            return self._table(key, device).index_select(0, t)
        low, high = -1, self.num_timesteps - 1
        prev = timestep_vector("prev_timesteps", prev_timesteps, batch, device, low, high)
        abar = self._table(("abar",), device)
        return _COEFFICIENTS[key[0]](abar[t + 1], abar[prev + 1], *key[1:])

    def _table(self, key: tuple, device: torch.device) -> Tensor:
        """The coefficients of every timestep t with t - 1 before it, kept per device."""
        table = self._tables.get((key, device))
        if table is None:
            abar = self._abar_from_minus_one
            name, *options = key
            table = abar if name == "abar" else _COEFFICIENTS[name](abar[1:], abar[:-1], *options)
            table = table.to(device)
            if not torch.compiler.is_compiling():
                self._tables[key, device] = table
        return table


def timestep_vector(
    name: str, timesteps: Timesteps, batch: int, device: torch.device, low: int, high: int
) -> Tensor:
    """timesteps as an int64 vector (batch,), checked to lie in [low, high]."""
    if isinstance(timesteps, Tensor):
        checks.check_integer_vector(name, timesteps, batch, device)
        checks.check_range(name, timesteps, low, high)
        return timesteps.to(torch.int64)
    checks.check_int(name, timesteps)
    if not low <= timesteps <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {timesteps}")
    return torch.full((batch,), timesteps, dtype=torch.int64, device=device)


def _check_num_timesteps(num_timesteps: int) -> None:
    checks.check_int("num_timesteps", num_timesteps)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")


def _add_noise(abar: Tensor, abar_prev: Tensor) -> Tensor:
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()], -1)


def _target(abar: Tensor, abar_prev: Tensor, prediction_type: str) -> Tensor:
    zero, one = torch.zeros_like(abar), torch.ones_like(abar)
    columns = {
        "epsilon": (zero, one),
        "v_prediction": (-(1 - abar).sqrt(), abar.sqrt()),
        "sample": (one, zero),
    }
    return torch.stack(columns[prediction_type], -1)


def _clean_sample(abar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """p, q of x0 = p x_t + q model_output."""
    if prediction_type == "epsilon":
        return abar.rsqrt(), -((1 - abar) / abar).sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt(), -(1 - abar).sqrt()
    return torch.zeros_like(abar), torch.ones_like(abar)


def _noise(abar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """r, o of noise = r x_t + o model_output."""
    if prediction_type == "epsilon":
        return torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "v_prediction":
        return (1 - abar).sqrt(), abar.sqrt()
    return (1 - abar).rsqrt(), -(abar / (1 - abar)).sqrt()


def _ddpm(abar: Tensor, abar_prev: Tensor, prediction_type: str, variance: str) -> Tensor:
    p, q = _clean_sample(abar, prediction_type)
    alpha = abar / abar_prev
    beta = 1 - alpha
    u = abar_prev.sqrt() * beta / (1 - abar)
    w = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    squared = beta * (1 - abar_prev) / (1 - abar) if variance == "fixed_small" else beta
    s = torch.where(abar_prev < 1, squared, 0).sqrt()  # the last step adds no noise
    return torch.stack([p, q, u, w, torch.zeros_like(p), s], -1)


def _ddim(abar: Tensor, abar_prev: Tensor, prediction_type: str, eta: float) -> Tensor:
    p, q = _clean_sample(abar, prediction_type)
    r, o = _noise(abar, prediction_type)
    s = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(min=0).sqrt()
    direction = (1 - abar_prev - s * s).clamp(min=0).sqrt()
    return torch.stack([p, q, abar_prev.sqrt(), direction * r, direction * o, s], -1)


_COEFFICIENTS: dict[str, Callable[..., Tensor]] = {
    "add_noise": _add_noise,
    "target": _target,
    "ddpm": _ddpm,
    "ddim": _ddim,
}
