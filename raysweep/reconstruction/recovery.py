"""Reconstructs one unit of a trial inside its range of blocks, and says what that did and cost."""

# O outputs, I inputs of a linear; S samples, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysweep.config.trial import Trial
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.losses import ratio
from raysweep.reconstruction.optimizer import MaskedAdamW
from raysweep.reconstruction.profile import UnitProfile, profile_step
from raysweep.reconstruction.range import CALIBRATION, VALIDATION, BlockRange, MaskRecipe
from raysweep.reconstruction.training import TextError, step_count, text_error, train
from raysweep.reconstruction.units import Unit, units_of


@dataclass(frozen=True)
class UnitResult:
    """What the reconstruction of one unit did. Losses are the trial's loss; errors are relative squared errors."""

    unit: str
    block: int
    linears: str
    loss_before: float
    loss_after: float
    validation_loss_before: float | None
    validation_loss_after: float | None
    error_before: float
    error_after: float
    steps: int
    training_flops: int
    trainable_parameters: int
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def unit_names(blocks: BlockRange, granularity: str) -> list[str]:
    return [unit.name for block in blocks.blocks.values() for unit in units_of(block, granularity)]


def recover_unit(blocks: BlockRange, name: str, trial: Trial, unit_name: str) -> UnitResult:
    """Trains the unit of the trial `name` on the calibration set; its new weights take the place of the pruned ones.

    Raises NumericalError when the weights diverge.
    """
    unit = next(unit for unit in _units(blocks, trial) if unit.name == unit_name)
    work = _MatrixWork(blocks, name, trial, unit) if unit.linear is not None else _ModuleWork(blocks, name, trial, unit)
    return work.recover()


def _units(blocks: BlockRange, trial: Trial) -> Iterator[Unit]:
    for block in blocks.blocks.values():
        yield from units_of(block, str(trial.granularity))


class _UnitWork:
    """One unit of one trial: what is trained, and how its error is measured before and after."""

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> None:
        self.blocks, self.name, self.trial, self.unit = blocks, name, trial, unit
        self.recipe = MaskRecipe.of(trial)
        self.device = blocks.device
        self.texts = [text for text in (CALIBRATION, VALIDATION) if text in blocks.texts]

    def recover(self) -> UnitResult:
        before = {text: self._shared_error(text) for text in self.texts}
        parameters = self._trial_parameters()
        with self.blocks.using(self.name, self.unit.block), _memory_peak(self.device) as device_peak:
            optimizer = MaskedAdamW(
                list(parameters.values()),
                [self._mask(full) for full in parameters],
                float(self.trial.learning_rate or 0.0),
                self.trial.max_grad_norm,
            )
            try:
                steps = self._train(optimizer)
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = None
            counted = optimizer.nbytes + self._counted_bytes(parameters)
        after = {text: self._error(text) for text in self.texts}
        return self._result(before, after, steps, parameters, device_peak() or counted)

    def _result(
        self,
        before: dict[str, TextError],
        after: dict[str, TextError],
        steps: int,
        parameters: dict[str, nn.Parameter],
        peak_bytes: int,
    ) -> UnitResult:
        def loss(errors: dict[str, TextError], text: str) -> float | None:
            return sum(errors[text].errors) / errors[text].elements if text in errors else None

        calibration_before, calibration_after = before[CALIBRATION], after[CALIBRATION]
        return UnitResult(
            unit=self.unit.name,
            block=self.unit.block.index,
            linears=",".join(self.unit.linears),
            loss_before=loss(before, CALIBRATION) or 0.0,
            loss_after=loss(after, CALIBRATION) or 0.0,
            validation_loss_before=loss(before, VALIDATION),
            validation_loss_after=loss(after, VALIDATION),
            error_before=ratio(calibration_before.errors, calibration_before.targets),
            error_after=ratio(calibration_after.errors, calibration_after.targets),
            steps=steps,
            training_flops=self._flops(),
            trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
            peak_bytes=peak_bytes,
        )

    def _shared_error(self, text: str) -> TextError:
        """The error before recovery, which every trial with this mask and unit shares."""
        key = ("error_before", self.recipe, self.unit.name, text)
        return self.blocks.knowledge.get(key, lambda: self._error(text))

    def _trial_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters to train by full name, each holding a tensor of the trial's own and asking for gradients."""
        weights = self.blocks.weights[self.name]
        parameters: dict[str, nn.Parameter] = {}
        for short in self._trained_names():
            full = self.unit.parameter_name(short)
            parameter = self.unit.module.get_parameter(short)
            if full not in weights:
                weights[full] = parameter.detach().clone()
            parameters[full] = parameter.requires_grad_(True)
        return parameters

    def _trained_names(self) -> list[str]:
        used = self._used_names()
        if self.trial.trainable == "weights":
            prunable = {f"{name}.weight" for name in self.unit.linears}
            used = [short for short in used if self.unit.parameter_name(short) in prunable]
        return used

    def _mask(self, full_name: str) -> Tensor | None:
        linear = self.unit.linears.get(full_name.removesuffix(".weight"))
        if linear is None or not full_name.endswith(".weight"):
            return None
        return linear.as_stored(self.blocks.mask(self.recipe, self.unit.block, linear))

    def _batch_samples(self) -> int:
        return min(self.trial.batch_size or 1, self.blocks.texts[CALIBRATION].activations.samples)

    def _used_names(self) -> list[str]:
        raise NotImplementedError

    def _train(self, optimizer: MaskedAdamW) -> int:
        raise NotImplementedError

    def _error(self, text: str) -> TextError:
        raise NotImplementedError

    def _counted_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        raise NotImplementedError

    def _flops(self) -> int:
        raise NotImplementedError


class _ModuleWork(_UnitWork):
    """A block or one of its halves, trained towards the dense model's output of it."""

    def _run(self, hidden_BTH: Tensor) -> Tensor:
        return self.unit.block.run(hidden_BTH, self.unit.module)

    def _train(self, optimizer: MaskedAdamW) -> int:
        text = self.blocks.texts[CALIBRATION].activations
        inputs_STH, targets_STH = self.unit.inputs(text), self.unit.targets(text)
        return train(self._run, optimizer, inputs_STH, targets_STH, self.trial, self.device)

    def _error(self, text: str) -> TextError:
        activations = self.blocks.texts[text].activations
        with self.blocks.using(self.name, self.unit.block):
            inputs_STH, targets_STH = self.unit.inputs(activations), self.unit.targets(activations)
            return text_error(self._run, inputs_STH, targets_STH, self.device)

    def _profile(self) -> UnitProfile:
        """Shared by all units of one shape: blocks of a model are usually alike."""
        text = self.blocks.texts[CALIBRATION].activations
        batch_BTH = self.unit.inputs(text)[: self._batch_samples()].to(self.device)
        shapes = tuple((name, tuple(p.shape)) for name, p in self.unit.module.named_parameters())
        key = ("profile", self.unit.half, shapes, tuple(batch_BTH.shape))
        return self.blocks.knowledge.get(key, lambda: profile_step(self.unit.module, self._run, batch_BTH))

    def _used_names(self) -> list[str]:
        return list(self._profile().parameters)

    def _counted_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        text = self.blocks.texts[CALIBRATION].activations
        batch = self.unit.inputs(text)[0].nbytes * self._batch_samples()
        weights = sum(parameter.nbytes for parameter in parameters.values())
        return weights + self._profile().saved_bytes + 2 * batch

    def _flops(self) -> int:
        samples = self.blocks.texts[CALIBRATION].activations.samples
        passes = samples * (self.trial.epochs or 1)
        return self._profile().step_flops * passes // self._batch_samples()


class _MatrixWork(_UnitWork):
    """One matrix on its dense inputs: y' - y = X (W' - W)^T + (b' - b), so no target is computed or stored."""

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> None:
        super().__init__(blocks, name, trial, unit)
        assert unit.linear is not None
        self.linear = unit.linear
        self.dense_OI = self.linear.weight_OI.clone()
        dense_bias = self.linear.bias_O
        self.dense_bias_O = None if dense_bias is None else dense_bias.clone()

    def _change(self, x_BTI: Tensor) -> Tensor:
        """y' - y, (B, T, O)."""
        weight: Tensor = self.unit.module.weight  # type: ignore[assignment]
        delta_OI = self.linear.from_stored(weight) - self.dense_OI
        bias: Tensor | None = self.unit.module.bias  # type: ignore[assignment]
        delta_bias_O = None if bias is None else bias - self.dense_bias_O  # type: ignore[operator]
        return functional.linear(x_BTI, delta_OI, delta_bias_O)

    def _train(self, optimizer: MaskedAdamW) -> int:
        inputs_STI = linear_inputs(self.blocks, self.unit)
        return train(self._change, optimizer, inputs_STI, None, self.trial, self.device)

    def _error(self, text: str) -> TextError:
        """From the Gram matrix: no token passes through the layer again."""
        weights = self.blocks.weights[self.name]
        weight_OI = self.linear.from_stored(weights[f"{self.linear.name}.weight"])
        bias_O = weights.get(f"{self.linear.name}.bias")
        statistics = self.blocks.statistics(text, self.linear, self.unit.block)
        error = self.blocks.matrix_error(text, self.unit.block, self.linear, weight_OI, bias_O)
        power = self.blocks.output_power(text, self.unit.block, self.linear)
        return TextError((error * power,), (power,), statistics.rows * weight_OI.shape[0])

    def _used_names(self) -> list[str]:
        return [name for name, _ in self.unit.module.named_parameters()]

    def _counted_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        tokens = self.blocks.texts[CALIBRATION].activations.tokens * self._batch_samples()
        outputs, inputs = self.dense_OI.shape
        size = self.dense_OI.element_size()
        weights = sum(parameter.nbytes for parameter in parameters.values())
        return weights + 2 * self.dense_OI.nbytes + tokens * (inputs + 2 * outputs) * size

    def _flops(self) -> int:
        text = self.blocks.texts[CALIBRATION].activations
        return 4 * self.dense_OI.numel() * text.samples * text.tokens * (self.trial.epochs or 1)


@torch.no_grad()
def linear_inputs(blocks: BlockRange, unit: Unit) -> Tensor:
    """The dense inputs (S, T, I) of a matrix unit over the calibration set, shared with the linears beside it.

    The dense block runs once more to give them, in the batches of the dense pass: the same numbers.
    """
    block = unit.block
    text = blocks.texts[CALIBRATION].activations
    leaders = {names[0] for names in block.input_groups}

    def make() -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        rows = slice(0, 0)

        def keep(name: str, x: Tensor) -> None:
            if name in leaders:
                x_BTI = x.reshape(rows.stop - rows.start, text.tokens, -1)
                if name not in kept:
                    kept[name] = torch.empty(text.samples, text.tokens, x_BTI.shape[-1], dtype=x.dtype)
                kept[name][rows] = x_BTI

        with blocks.using(None, block), block.watch_inputs(keep):
            for rows in batches(text.samples, text.tokens, blocks.device):
                block.run(text.inputs[block.index][rows].to(blocks.device))
        return kept

    leader = next(names[0] for names in block.input_groups if unit.linear and unit.linear.name in names)
    return blocks.knowledge.get(("linear_inputs", block.index), make)[leader]


@contextmanager
def _memory_peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Bytes that the device's allocator handed out within the context beyond those at its start; None on a CPU."""
    if device.type == "cpu":
        yield lambda: None
        return
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - start
