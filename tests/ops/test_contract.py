"""What the contract promises for every op: the compiler's checks, gradients to second order, no
fallback.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import leedl_fast
from leedl_fast import (
    add_layer_norm,
    additive_attention,
    attention,
    diffusion,
    linear_cross_entropy,
    use_backend,
)
from leedl_fast.backends import cpu_modules, select
from leedl_fast.ops import contract
from leedl_fast.ops.contract import OPERATORS
from leedl_fast.testing.compare import poisoned_outputs

SCHEDULE = diffusion.NoiseSchedule.linear(100)
TIMESTEPS = torch.tensor([3, 50])
SEEDS = torch.tensor([5, 6])
Inputs = tuple[Tensor, ...]


def _randn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes
    )


QKV = ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2))
LAYER_NORM = ((2, 3, 5), (2, 3, 5), (5,), (5,))
IMAGES = ((2, 3, 2), (2, 3, 2))
HEAD = ((5, 4), (7, 4), (7,))
TARGETS = torch.tensor([3, -100, 0, 6, 3])
CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable]] = {
    "attention": (
        QKV,
        lambda *x: attention(*x, window=(3, 2), backend="cpu", return_lse=True),
    ),
    "attention-key-lengths": (
        QKV,
        lambda *x: attention(*x, causal=True, key_lengths=TIMESTEPS.clamp(max=7), backend="cpu"),
    ),
    "additive_attention": (
        (*QKV, (3,)),
        lambda *x: additive_attention(*x, window=(3, 2), backend="cpu"),
    ),
    "additive_attention-key-lengths": (
        (*QKV, (4, 3)),
        lambda *x: additive_attention(
            *x, causal=True, key_lengths=TIMESTEPS.clamp(max=7), backend="cpu"
        ),
    ),
    "layer_norm": (LAYER_NORM, lambda *x: add_layer_norm(*x, backend="cpu")),
    "layer_norm-dropout": (
        LAYER_NORM,
        lambda *x: add_layer_norm(*x, dropout_p=0.4, seed=3, backend="cpu"),
    ),
    "rms_norm": (LAYER_NORM, lambda *x: add_layer_norm(*x, norm="rms", backend="cpu")),
    "add_noise": (
        IMAGES[:1],
        lambda x: diffusion.add_noise(x, TIMESTEPS, SCHEDULE, seed=SEEDS, backend="cpu"),
    ),
    "noise_prediction_loss": (
        IMAGES,
        lambda m, x: diffusion.noise_prediction_loss(
            m, x, TIMESTEPS, SCHEDULE, seed=SEEDS, prediction_type="v_prediction", backend="cpu"
        ),
    ),
    "ddpm_step": (
        IMAGES,
        lambda m, x: diffusion.ddpm_step(m, TIMESTEPS, x, SCHEDULE, seed=SEEDS, backend="cpu"),
    ),
    "ddim_step": (
        IMAGES * 2,
        lambda m, x, n, u: diffusion.ddim_step(
            m,
            TIMESTEPS,
            x,
            SCHEDULE,
            eta=0.5,
            noise=n,
            clip_range=3.0,
            unconditional_output=u,
            guidance_scale=2.0,
            backend="cpu",
        ),
    ),
    "linear_cross_entropy": (
        HEAD,
        lambda h, w, b: linear_cross_entropy(h, w, TARGETS, bias=b, backend="cpu"),
    ),
    "linear_cross_entropy-none": (
        HEAD[:2],
        lambda h, w: linear_cross_entropy(
            h, w, TARGETS, reduction="none", label_smoothing=0.1, backend="cpu"
        ),
    ),
}
ALL = pytest.mark.parametrize("name", CALLS)


@ALL
def test_gradients_match_finite_differences(name: str) -> None:
    shapes, call = CALLS[name]
    assert torch.autograd.gradcheck(call, _randn(*shapes))


@ALL
def test_second_derivatives_match_finite_differences(name: str) -> None:
    shapes, call = CALLS[name]
    assert torch.autograd.gradgradcheck(call, _randn(*shapes))


def test_second_derivatives_of_a_tensor_passed_three_times() -> None:
    (x,) = _randn((1, 2, 5, 3))
    assert torch.autograd.gradgradcheck(lambda x: attention(x, x, x, backend="cpu"), (x,))


@ALL
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    shapes, call = CALLS[name]

    def gradients(function: Callable, inputs: Inputs) -> Inputs:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs + torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with poisoned_outputs() as ran:
        actual = gradients(compiled, _randn(*shapes))
    assert ran
    for result, expected in zip(actual, gradients(call, _randn(*shapes)), strict=True):
        torch.testing.assert_close(result, expected)


def _operator_inputs(name: str, grad: bool) -> tuple:
    """Arguments of the operator `name`, float32, with the backend last."""
    q, k, v = (x.detach().requires_grad_(grad) for x in _randn(*QKV, dtype=torch.float32))
    (score_weight,) = (x.detach().requires_grad_(grad) for x in _randn((4, 3), dtype=torch.float32))
    x, residual, weight, bias = (
        x.detach().requires_grad_(grad) for x in _randn(*LAYER_NORM, dtype=torch.float32)
    )
    model_output, sample = (
        x.detach().requires_grad_(grad) for x in _randn(*IMAGES, dtype=torch.float32)
    )
    head = tuple(x.detach().requires_grad_(grad) for x in _randn(*HEAD, dtype=torch.float32))
    out, lse = torch.rand(2, 4, 5, 2), torch.rand(2, 4, 5)
    two, six = torch.rand(2, 2, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    options = (0.5, 3, 2, "softmax", None, 0.0, False)
    lengths = torch.tensor([7, 2])
    arguments = {
        "attention_forward": (q, k, v, *(None,) * 7, *options),
        "attention_backward": (
            *(out, lse, q, k, v, None, None, None, lengths, None, None, None, out, lse, lse + 1),
            *options,
        ),
        "additive_attention_forward": (q, k, v, score_weight, lengths, 3, 2),
        "additive_attention_backward": (
            *(out, q, k, v, score_weight, lengths, out, lse, lse + 1),
            *(3, 2),
        ),
        "add_layer_norm_forward": (x, residual, weight, bias, SEEDS[:1], 1e-5, "layer", 0.3),
        "add_layer_norm_backward": (*(x, residual, x, weight, bias, 1e-5, "layer"),),
        "add_layer_norm_dropout_backward": (x, SEEDS[:1], torch.bfloat16, 0.3),
        "diffusion_randn": (SEEDS, (2, 5), torch.float32),
        "diffusion_add_noise": (sample, None, two, SEEDS),
        "diffusion_noise_prediction_loss_forward": (model_output, sample, None, two, SEEDS),
        "diffusion_noise_prediction_loss_backward": (
            *(model_output, sample, None, two),
            *(torch.rand(2, dtype=torch.float64), SEEDS),
        ),
        "linear_cross_entropy_forward": (*head, TARGETS, -100, "mean", 0.1, grad),
        "linear_cross_entropy_backward": (
            *(torch.rand(5), *head, TARGETS),
            *(-100, "none", 0.1, False),
        ),
        "diffusion_step": (model_output, None, sample, None, six, SEEDS, TIMESTEPS, 1.0, None),
    }
    return *arguments[name], "cpu"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(name: str, grad: bool) -> None:
    differentiable = name.endswith(("_forward", "add_noise", "_step"))
    operator = getattr(torch.ops.leedl_fast, name).default
    torch.library.opcheck(operator, _operator_inputs(name, grad and differentiable))


def test_an_explicit_backend_never_falls_back() -> None:
    q = torch.randn(1, 1, 4, 300)
    attention(q, q, q)
    with pytest.raises(NotImplementedError, match="cpu: head_dim must be at most 256, got 300"):
        attention(q, q, q, backend="cpu")
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="head_dim"):
        attention(q, q, q)


def test_use_backend_nests_and_ends() -> None:
    x = torch.randn(3, 8)
    with poisoned_outputs() as ran:
        with use_backend("eager"):
            add_layer_norm(x, x)
            assert ran == []
            with use_backend("cpu"):
                add_layer_norm(x, x)
            assert ran == ["add_layer_norm_forward"]
            add_layer_norm(x, x)
        assert len(ran) == 1
        add_layer_norm(x, x)
        assert len(ran) == 2


def test_use_backend_is_seen_by_compiled_code() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 8)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    with poisoned_outputs() as ran:
        compiled(x, x)
        assert "add_layer_norm_forward" in ran
        ran.clear()
        with use_backend("eager"):
            compiled(x, x)
        assert ran == []


@pytest.mark.parametrize("backend", ["gpu", "", "CPU"])
def test_an_unknown_backend_is_named(backend: str) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"backend must be one of .*, got '" + backend):
        add_layer_norm(x, x, backend=backend)
    with pytest.raises(ValueError, match=r"backend must be one of"), use_backend(backend):
        pass


def test_every_backend_gives_its_reason() -> None:
    problem = OPERATORS["diffusion_randn"].describe(SEEDS.to("meta"), (2, 5), torch.float32)
    with pytest.raises(NotImplementedError, match="cpu: the tensors are on meta"):
        select("diffusion", problem, "cpu")
    assert select("diffusion", problem).backend == "eager"


def test_the_public_names() -> None:
    for name in leedl_fast.__all__:
        assert getattr(leedl_fast, name).__doc__


class Subclass(Tensor):
    pass


X = torch.zeros(2, 3)
SIGNATURES = pytest.mark.parametrize(
    "signature",
    [contract._signature, *(module.signature for module in cpu_modules.modules().values())],
    ids=["Python", *cpu_modules.modules()],
)


@SIGNATURES
def test_equal_calls_have_equal_signatures(signature: Callable) -> None:
    calls = [
        (X,),
        (X, None),
        (None, X),
        (X, X),
        (X.double(),),
        (X.bfloat16(),),
        (X.half(),),
        (X.bool(),),
        (X.byte(),),
        (X.T,),
        (X[None],),
        (X[0],),
        (X[0, 0],),
        (X[:0],),
        (X.flatten(),),
        (),
    ]
    keys = [signature(*call) for call in calls]
    assert None not in keys
    assert len(set(keys)) == len(calls)
    again = [torch.ones(3, 2).T, torch.nn.Parameter(X), X.clone().requires_grad_() + 1]
    assert {signature(x) for x in again} == {keys[0]}


@SIGNATURES
@pytest.mark.parametrize(
    "argument",
    [X.as_subclass(Subclass), X.to_sparse(), X.numpy(), [1.0], 2.0, "x"],
    ids=lambda argument: type(argument).__name__,
)
def test_what_is_no_plain_tensor_has_no_signature(signature: Callable, argument: object) -> None:
    if isinstance(argument, Tensor) and argument.is_sparse and signature is contract._signature:
        pytest.skip("shape, dtype and device are all that Python asks for")
    assert signature(X, argument) is None


def test_the_memory_of_checked_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "MOST_REMEMBERED", 3)
    checked = []
    resolve = contract.resolver("diffusion", lambda x, n: checked.append(n) or CPU_PROBLEM, "x")
    for n in (0, 1, 0, 2, 3, 3, 0):
        resolve(None, (X,), n)
    assert checked == [0, 1, 2, 3, 0]


CPU_PROBLEM = torch.empty(0)  # all that the backends ask of a problem is its device


@pytest.mark.parametrize("isa", cpu_modules.modules())
def test_compiled_code_takes_tensors_only(isa: str) -> None:
    run = cpu_modules.modules()[isa].add_layer_norm_forward
    with pytest.raises(TypeError, match="incompatible function arguments"):
        run(X, X, X.numpy(), X, None, None, None, 1e-5, False, 0.0, 1)
    with pytest.raises(RuntimeError, match="storage"):
        run(X, X, X.to_sparse(), X, None, None, None, 1e-5, False, 0.0, 1)
