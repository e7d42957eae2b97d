"""Other people's models: as they are, and after `leedl_fast.patch`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leedl_fast import patch, use_backend
from leedl_fast.benchmarks.suite import (
    OURS,
    Case,
    Expected,
    Implementation,
    Measure,
    Settings,
    Work,
)

UNPATCHED = "the model as it is"


@dataclass(frozen=True)
class PatchCase:
    """kind: "encoder", torch.nn's, or "mistral", that of transformers with its window."""

    kind: str
    seqlen: int
    width: int = 256
    num_heads: int = 4
    num_layers: int = 4
    batch: int = 1
    window: int | None = None
    bars: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        title = {"encoder": "TransformerEncoder", "mistral": "Mistral"}[self.kind]
        window = "" if self.window is None else f", window {self.window}"
        return f"{title}, forward + backward{window}"

    @property
    def sizes(self) -> str:
        sizes = f"B{self.batch} S{self.seqlen} width {self.width} H{self.num_heads}"
        return f"{self.num_layers} layers, {sizes}"


def cases(settings: Settings) -> list[PatchCase]:
    if settings.tier == "tiny":
        small = {"width": 32, "num_heads": 2, "num_layers": 2}
        bars = {UNPATCHED: 1.0}
        return [
            PatchCase("encoder", 24, **small, bars=bars),
            PatchCase("mistral", 40, window=8, **small, bars=bars),
        ]
    main = [
        PatchCase("encoder", 1024, batch=2, bars={UNPATCHED: 1.0}),
        PatchCase("mistral", 4096, window=256, bars={UNPATCHED: 1.0}),
    ]
    if settings.tier == "full":
        main += [PatchCase("encoder", 128, batch=16), PatchCase("mistral", 2048, batch=2)]
    return main


def test_patch(case: PatchCase, measure: Measure) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[case.kind](case)
    model, inputs = model.to(measure.settings.device), inputs.to(measure.settings.device)
    exact, patched = copy.deepcopy(model).double(), copy.deepcopy(model)
    patch(patched)
    results = [step(module, inputs, "eager")() for module in (exact, model)]
    names = ("output", "gradient of the first layer")
    expected = [Expected.of(*each, torch.float32) for each in zip(names, *results, strict=True)]
    implementations = {
        OURS: Implementation(step(patched, inputs, measure.settings.backend)),
        UNPATCHED: Implementation(step(model, inputs, "eager")),
    }
    measure(Case("patch", case.name, case.sizes, Work(), bars=case.bars), implementations, expected)


def encoder(case: PatchCase) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(
        case.width, case.num_heads, 4 * case.width, dropout=0.0, batch_first=True
    )
    model = nn.TransformerEncoder(layer, case.num_layers, enable_nested_tensor=False)
    return model, torch.randn(case.batch, case.seqlen, case.width)


def mistral(case: PatchCase) -> tuple[nn.Module, Tensor]:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=96,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_heads // 2,
        max_position_embeddings=case.seqlen,
        sliding_window=case.window,
        use_cache=False,
    )
    return MistralForCausalLM(config), torch.randint(96, (case.batch, case.seqlen))


MODELS: dict[str, Callable[[PatchCase], tuple[nn.Module, Tensor]]] = {
    "encoder": encoder,
    "mistral": mistral,
}


def step(model: nn.Module, inputs: Tensor, backend: str) -> Callable[[], list[Tensor]]:
    """Forward and backward of the sum of squares; the output, and the first layer's gradient."""
    first = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    if inputs.is_floating_point():
        inputs = inputs.to(first.dtype)

    def run() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        with use_backend(backend):
            output = model(inputs)
            output = output if isinstance(output, Tensor) else output.logits
            output.square().mean().backward()
        assert first.grad is not None
        return [output.detach(), first.grad]

    return run
