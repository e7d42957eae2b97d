"""A real model: a training step of the GPT, and the losses of whole runs on real text."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leedl_fast import use_backend
from leedl_fast.benchmarks.suite import (
    COMPILED,
    EAGER,
    OURS,
    Case,
    Expected,
    Implementation,
    Measure,
    Recorder,
    Settings,
    Work,
)
from leedl_fast.models.gpt import GPT, GPTConfig

CURVE_TOLERANCE = 1e-3  # over the whole run, in nats


@dataclass(frozen=True)
class GPTCase:
    seqlen: int
    window: int | None
    embed_dim: int = 256
    num_heads: int = 4
    num_layers: int = 4
    batch: int = 1
    bars: dict[str, float] = field(default_factory=dict)
    compiled: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        window = "full attention" if self.window is None else f"window {self.window}"
        return f"training step, {self.num_layers} layers, {window}"

    @property
    def sizes(self) -> str:
        return f"B{self.batch} S{self.seqlen} width {self.embed_dim} H{self.num_heads}"

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=96,
            context_length=self.seqlen,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            window=self.window,
        )


def cases(settings: Settings) -> list[GPTCase]:
    if settings.tier == "tiny":
        return [GPTCase(32, 8, embed_dim=32, num_heads=2, num_layers=2, bars={EAGER: 3})]
    main = [GPTCase(2048, 128, bars={EAGER: 3})]
    if settings.tier == "full":
        main += [
            GPTCase(2048, 128, compiled=True),
            GPTCase(1024, None),
            GPTCase(512, 64, batch=8),
            GPTCase(4096, 128, embed_dim=512, num_heads=8),
        ]
    return main


def test_gpt(case: GPTCase, measure: Measure) -> None:
    torch.manual_seed(0)
    model = GPT(case.config).to(measure.settings.device)
    tokens = torch.randint(case.config.vocab_size, (2, case.batch, case.seqlen))
    tokens, targets = tokens.to(measure.settings.device)
    exact = training_step(copy.deepcopy(model).double(), tokens, targets, "eager")()
    plain = training_step(copy.deepcopy(model), tokens, targets, "eager")()
    names = ("loss", *("gradient of " + name for name, _ in model.named_parameters()))
    expected = [Expected.of(*each, case.dtype) for each in zip(names, exact, plain, strict=True)]
    implementations = {
        OURS: Implementation(
            training_step(copy.deepcopy(model), tokens, targets, measure.settings.backend)
        ),
        EAGER: Implementation(training_step(copy.deepcopy(model), tokens, targets, "eager")),
    }
    if case.compiled:
        implementations[COMPILED] = Implementation(
            training_step(
                copy.deepcopy(model),
                tokens,
                targets,
                "eager",
                lambda f: torch.compile(f, dynamic=False),
            ),
            compiled=True,
        )
    measure(
        Case(
            op="gpt",
            name=case.name,
            sizes=case.sizes,
            work=Work(flops=flops(case, model)),
            bars=case.bars,
        ),
        implementations,
        expected,
    )


def flops(case: GPTCase, model: GPT) -> float:
    """6 per weight and token in the linear layers, 14 head_dim per visible pair in attention."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights -= case.seqlen * case.embed_dim  # the position embedding is only read
    left = case.seqlen if case.window is None else case.window
    pairs = sum(min(i, left) + 1 for i in range(case.seqlen))
    attention = 14 * case.embed_dim * pairs * case.num_layers
    return float(case.batch * (6 * weights * case.seqlen + attention))


def training_step(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    backend: str,
    wrap: Callable[[Callable], Callable] = lambda f: f,
) -> Callable[[], list[Tensor]]:
    """One call is one step of AdamW; it returns the loss and the gradients of that step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = wrap(model.loss)

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with use_backend(backend):
            loss = loss_of(tokens, targets)
            loss.backward()
        optimizer.step()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return step


def test_loss_curves(recorder: Recorder) -> None:
    """The same training on both backends, from the same seed."""
    from leedl_fast.training.engine import train
    from leedl_fast.training.registry import configure

    settings = recorder.settings
    sizes = {
        "tiny": {"steps": 3, "batch_size": 2, "context_length": 16, "num_layers": 1}
        | {"num_heads": 2, "embed_dim": 16, "window": 4},
        "quick": {"steps": 200, "batch_size": 4, "context_length": 256, "num_layers": 2}
        | {"embed_dim": 64, "window": 64},
        "full": {"steps": 200, "batch_size": 8, "context_length": 512, "num_layers": 4}
        | {"embed_dim": 128, "window": 64},
    }[settings.tier]
    run = configure("gpt", **sizes)
    losses = {}
    for name, backend in ((OURS, settings.backend), (EAGER, "eager")):
        recorder.on_status(f"gpt: {run.settings.steps} training steps, {name}")
        result = train(run, backend=backend, quiet=True)
        if result.interrupted:  # training takes Ctrl-C for itself, to end after a whole step
            raise KeyboardInterrupt
        losses[name] = result.losses
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    recorder.curves.append(
        {
            "title": "The same GPT training, fused and eager",
            "subtitle": "{num_layers} layers, width {embed_dim}, context {context_length}, "
            "window {window}, batch {batch_size}, on the Python documentation".format(**sizes),
            "steps": list(range(1, run.settings.steps + 1)),
            "losses": losses,
            "max_difference": difference,
            "allowed": CURVE_TOLERANCE,
        }
    )
    assert difference <= CURVE_TOLERANCE, (
        f"the loss curves must agree within {CURVE_TOLERANCE}, got {difference:.2e}"
    )
