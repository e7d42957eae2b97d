"""Runs on two processes, started by test_several_devices.py: `python sharded_runs.py NAME FOLDER`.

The folder has text.txt and pairs.csv to train on.
"""

import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import leedl_fast.layers.add_layer_norm
import leedl_fast.layers.attention
from leedl_fast.data.images import load_digits
from leedl_fast.models import vqvae
from leedl_fast.training.callbacks import Recorder
from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.engine import make_task, resumed_run, train
from leedl_fast.training.registry import configure
from leedl_fast.training.tasks import cyclegan
from leedl_fast.training.tasks.gpt import GPTTask

SIZES = {"steps": 3, "batch_size": 2, "embed_dim": 16, "num_heads": 2, "num_layers": 2}
GPT = SIZES | {"context_length": 16, "window": 4, "ema_decay": 0.9, "warmup_steps": 2}


def gpt(folder, **changes):
    return configure("gpt", **GPT | {"data": str(folder / "text.txt")} | changes)


def run(config, strategy="fsdp", **options):
    return train(
        config,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        backend="cpu",
        quiet=True,
        **options,
    )


def after_each_step(patch, check):
    """check(task, steps done, rank) in every process."""
    end = Recorder.on_train_batch_end

    def on_train_batch_end(self, trainer, task, *arguments):
        check(task, self.result.steps_done + 1, trainer.global_rank)
        end(self, trainer, task, *arguments)

    patch.setattr(Recorder, "on_train_batch_end", on_train_batch_end)


def stopped(config, step, patch, **options):
    """A run that Ctrl-C ends after `step`; it reaches one of the processes alone."""

    def interrupt(task, now, rank):
        if (now, rank) == (step, 1):
            signal.raise_signal(signal.SIGINT)

    with patch.context() as during:
        after_each_step(during, interrupt)
        result = run(config, **options)
    assert result.interrupted
    assert result.steps_done == step
    return result


def go_on(result, **options):
    about = read_checkpoint(result.checkpoint, result.task.name)[KEY]
    assert about["step"] == result.steps_done
    return run(resumed_run(about, {}), resume=result.checkpoint, **options)


def shares(folder, patch):
    """Between steps each process has half of everything; kernels see whole, plain tensors."""
    steps, inputs = [], []

    def check(task, step, rank):
        for name, parameter in task.named_parameters():
            assert isinstance(parameter, DTensor), name
            rows = len(parameter)
            assert len(parameter.to_local()) in (rows // 2, rows - rows // 2), name
        for state in task.optimizers().state.values():
            assert isinstance(state["exp_avg"], DTensor)
        steps.append(step)

    def spy(module, name):
        op = getattr(module, name)

        def watched(*arguments, **options):
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            inputs.extend((name, type(x)) for x in tensors)
            return op(*arguments, **options)

        patch.setattr(module, name, watched)

    def loss(task, batch):
        """The embedding is whole as the loss begins; a layer becomes it, and the last one stays."""
        first, last = (layer.linear1 for layer in task.model.transformer.layers)
        whole = [not isinstance(part.weight, DTensor) for part in (task.model.head, first, last)]
        assert whole == [True, False, False]
        result = loss_of(task, batch)
        whole = [not isinstance(part.weight, DTensor) for part in (task.model.head, first, last)]
        assert whole == [True, False, True]
        return result

    loss_of = GPTTask.loss
    patch.setattr(GPTTask, "loss", loss)
    after_each_step(patch, check)
    spy(leedl_fast.layers.attention, "attention")
    spy(leedl_fast.layers.add_layer_norm, "add_layer_norm")
    run(gpt(folder, validate_every=2))
    assert steps == [1, 2, 3]
    assert set(inputs) == {
        ("attention", torch.Tensor),
        ("add_layer_norm", torch.Tensor),
        ("add_layer_norm", torch.nn.Parameter),
    }


def interrupted(folder, patch):
    """The run that goes on has the losses of one that was left alone."""
    config = gpt(folder, steps=6, dropout=0.1, validate_every=2)
    whole = run(config)
    first = stopped(config, 3, patch, output=folder)
    second = go_on(first, output=folder)
    assert first.losses + second.losses == whole.losses
    assert first.validation | second.validation == whole.validation
    assert second.metrics == whole.metrics


def precisions(folder, patch):
    """As with DDP, and validation, in float32 whatever the weights are, leaves no trace."""
    for precision in ("bf16-mixed", "bf16-true"):
        expected = run(gpt(folder, precision=precision), "ddp")
        wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
        for strategy in ("ddp", "fsdp"):
            result = run(gpt(folder, precision=precision, validate_every=1), strategy)
            tolerance = 0 if strategy == "ddp" else 1e-3
            assert result.losses == pytest.approx(expected.losses, rel=tolerance), precision
            assert result.metrics == pytest.approx(expected.metrics, rel=tolerance), precision
            assert result.validation.keys() == {1, 2, 3}
            assert {parameter.dtype for parameter in result.task.parameters()} == {wanted}


def adversaries(folder, patch):
    """Two optimizers and second derivatives train as with DDP, with a stop between."""
    patch.setattr(cyclegan, "load_mnist", load_digits)
    for name, variant in (("gan", "wgan-gp"), ("cyclegan", "")):
        config = configure(name, variant, **SIZES, patch_size=4)
        whole = run(config, "ddp")
        first = stopped(config, 2, patch, output=folder / name)
        second = go_on(first)
        assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-5), name
        assert second.metrics == pytest.approx(whole.metrics, rel=1e-3), name


def layers(folder, patch):
    """Layers in both orders, read by others than their stack, and run more than once a step."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_layers"}
    translation = sizes | {
        "data": str(folder / "pairs.csv"),
        "num_decoder_layers": 2,
        "vocabulary_size": 40,
        "max_length": 24,
        "dropout": 0.0,
        "guided_attention": 0.5,
        "sampling_probability": 0.3,
    }
    for config in (
        configure("bert", **SIZES, ema_decay=0.9, norm_first=False),
        configure("transformer", "copying", **translation),
    ):
        expected, result = run(config, "ddp"), run(config)
        assert result.losses == pytest.approx(expected.losses, rel=1e-5), config.task
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-3), config.task


def codebook(folder, patch):
    """Two processes keep one codebook: that of one process with both batches."""
    sizes = SIZES | {"steps": 6, "num_codes": 24}
    for option, decay in (("ema", 0.98), ("loss", 0.98), ("ema", 0.3), ("loss", 0.3)):
        config = configure("vqvae", **sizes, codebook=option, decay=decay)
        moved = []

        def check(task, step, rank):
            for tensor in (*task.parameters(), *task.buffers()):
                both = [torch.empty_like(tensor) for _ in range(2)]
                torch.distributed.all_gather(both, tensor.detach())
                assert torch.equal(*both), (task.model.config, step)

        def broadcast(tensor, src, broadcast=torch.distributed.broadcast, moved=moved):
            broadcast(tensor, src=src)
            moved += [tensor] if tensor.shape == (24, 16) else []

        with patch.context() as during:
            after_each_step(during, check)
            during.setattr(vqvae.dist, "broadcast", broadcast)
            result = run(config, "ddp")
        assert bool(moved) == (decay < 0.9)
        if moved:
            continue
        one = make_task(config)
        setup = one.configure_optimizers()
        with patch.context() as alone:
            alone.setattr(vqvae.dist, "is_initialized", lambda: False)
            for step in range(config.settings.steps):
                setup["optimizer"].zero_grad()
                one.loss(torch.cat([one.batch(2 * step + rank) for rank in range(2)])).backward()
                torch.nn.utils.clip_grad_norm_(one.parameters(), config.settings.gradient_clip)
                setup["optimizer"].step()
                setup["lr_scheduler"]["scheduler"].step()
        trained = result.task.model.quantizer.state_dict()
        torch.testing.assert_close(trained, one.model.quantizer.state_dict(), atol=2e-5, rtol=0)


CHECKS = (shares, interrupted, precisions, adversaries, layers, codebook)

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        runs = {check.__name__: check for check in CHECKS}
        runs[sys.argv[1]](Path(sys.argv[2]), patch)
