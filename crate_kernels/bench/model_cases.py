"""Whole models, and a few layers of one: what a step is, and what it must compute in float64."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.bert import IGNORED
from ..models.crate import Transformer
from .check import Outputs
from .peers import Candidate, build_unfused
from .timing import Step
from .workloads import CLASSES, ENCODER_DEPTH, Workload


def autocast(w: Workload, device: torch.device) -> contextlib.AbstractContextManager:
    wanted = w.autocast or w.suite == "model"
    if not wanted or w.torch_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=w.torch_dtype)


@dataclass
class ModelCase:
    """The unfused model every candidate starts from, and one batch of random images."""

    w: Workload
    device: torch.device
    base: nn.Module
    images: Tensor
    labels: Tensor
    generator: torch.Generator
    built: dict[str, nn.Module] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    sets: int = 1

    @classmethod
    def make(cls, w: Workload, device: torch.device, generator: torch.Generator) -> ModelCase:
        base = cls.unfused(w, device).train(w.mode != "forward")
        case = cls(w, device, base, torch.empty(0), torch.empty(0), generator)
        case.draw()
        return case

    @staticmethod
    def unfused(w: Workload, device: torch.device) -> nn.Module:
        return build_unfused(w, device)

    def draw(self) -> None:
        """Fresh images and labels."""
        options: Any = {"device": self.device, "generator": self.generator}
        self.images = torch.randn(self.w.batch, 3, 224, 224, **options)
        self.labels = torch.randint(CLASSES, (self.w.batch,), **options)
        self.scales.clear()

    def resident(self, candidate: Candidate) -> int:
        """Bytes of the parameters and images."""
        tensors = [self.images, *self.module(candidate).parameters()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def module(self, candidate: Candidate) -> nn.Module:
        """The same at every call: it is compiled once."""
        if candidate.name not in self.built:
            model = copy.deepcopy(self.base)
            self.built[candidate.name] = candidate.build_model(self.w, model)
        return self.built[candidate.name]

    def step(self, candidate: Candidate, i: int) -> Step:
        """One inference, or one whole training step: forward, backward, fused AdamW."""
        if candidate.name not in self.steps:
            model = self.module(candidate)
            inference = self.w.mode == "forward"
            self.steps[candidate.name] = (
                (lambda: self._inference(model)) if inference else self._training_step(model)
            )
        return self.steps[candidate.name]

    def _training_step(self, model: nn.Module) -> Step:
        capturable = self.device.type == "cuda"  # so that the step can go into a CUDA graph
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, fused=True, capturable=capturable
        )

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)
            self._loss(model)[0].backward()
            optimizer.step()

        return train

    def _loss(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        with autocast(self.w, self.device):
            return self._call(model, self.images, self.labels)

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a part of the batch adds to the loss, and the outputs."""
        logits = model(images)
        return F.cross_entropy(logits, labels, reduction="sum") / self.w.batch, logits

    def _inference(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), autocast(self.w, self.device):
            return self._output(model)

    def _output(self, model: nn.Module) -> Tensor:
        """All that an inference makes: no loss where the model gives none."""
        output: Tensor = model(self.images)
        return output

    def _counted(self, output: Tensor, labels: Tensor) -> Tensor:
        """The outputs without what means nothing; no part of a timed step."""
        return output

    def outputs(self, candidate: Candidate) -> Outputs:
        """Logits and, of a training step, all gradients as one vector (see _flatten)."""
        model = self.module(candidate)
        if self.w.mode == "forward":
            return {"output": self._counted(self._inference(model), self.labels)}
        loss, logits = self._loss(model)
        loss.backward()
        output = self._counted(logits.detach(), self.labels)
        return {"output": output, "gradients": self._flatten(model)}

    def _flatten(self, model: nn.Module) -> Tensor:
        """Every parameter's gradient over its RMS in float64, so that each weighs the same."""
        gradients = {
            name.removeprefix("_orig_mod."): p.grad.double()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        model.zero_grad(set_to_none=True)
        if not self.scales:  # the reference comes first
            for name, g in gradients.items():
                self.scales[name] = float(g.square().mean().sqrt()) or 1.0
        return torch.cat([gradients[name].flatten() / s for name, s in self.scales.items()])

    def reference(self) -> Outputs:
        """The unfused model in float64, a part of the batch at a time."""
        model = copy.deepcopy(self.base).double()
        with_gradients = self.w.mode != "forward"
        outputs = []
        with torch.set_grad_enabled(with_gradients):
            for images, labels in zip(self.images.split(16), self.labels.split(16), strict=True):
                images = images.double() if images.is_floating_point() else images
                loss, output = self._call(model, images, labels)
                outputs.append(self._counted(output.detach(), labels))
                if with_gradients:
                    loss.backward()
        result = {"output": torch.cat(outputs)}
        if with_gradients:
            result["gradients"] = self._flatten(model)
        return result


@dataclass
class EncoderCase(ModelCase):
    """A few layers on random tokens; no gradient of these, and no optimizer."""

    @staticmethod
    def unfused(w: Workload, device: torch.device) -> nn.Module:
        return Transformer(w.width, ENCODER_DEPTH, w.heads, w.head_dim).to(device)

    def draw(self) -> None:
        """Fresh tokens, in place of the images."""
        shape = (self.w.batch, self.w.tokens, self.w.width)
        self.images = torch.randn(shape, device=self.device, generator=self.generator)
        self.labels = torch.empty(self.w.batch, device=self.device)
        self.scales.clear()

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Half the mean square of a token."""
        tokens = model(images)
        return tokens.square().sum() / (2 * self.w.batch * self.w.tokens), tokens

    def _training_step(self, model: nn.Module) -> Step:
        def both_passes() -> None:
            model.zero_grad(set_to_none=True)
            self._loss(model)[0].backward()

        return both_passes


@dataclass
class MaskedCase(ModelCase):
    """CRATE-MAE: the same patches hidden for all; the outputs are the predicted patches."""

    def draw(self) -> None:
        super().draw()
        base: Any = self.base
        shape = (self.w.batch, base.patch_embed.num_patches)
        noise = torch.rand(shape, device=self.device, generator=self.generator)
        self.labels = (noise.argsort(1) >= shape[1] // 4).float()  # three quarters

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, patches, _ = model(images, mask=labels)
        return loss * (len(images) / self.w.batch), patches

    def _output(self, model: nn.Module) -> Tensor:
        return self._call(model, self.images, self.labels)[1]


@dataclass
class TextCase(ModelCase):
    """CRATE-GPT: random tokens, and the next ones."""

    def draw(self) -> None:
        base: Any = self.base
        head = getattr(base.lm_head, "decoder", base.lm_head)
        vocabulary, context = head.out_features, base.context
        tokens = torch.randint(
            vocabulary, (self.w.batch, context + 1), device=self.device, generator=self.generator
        )
        self.images, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.scales.clear()

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = model(images, labels)
        return loss * (len(images) / self.w.batch), logits

    def _output(self, model: nn.Module) -> Tensor:
        return self._call(model, self.images, self.labels)[1]


@dataclass
class PaddedCase(TextCase):
    """CRATE-BERT without dropout: sequences from half as long to full, each token predicted.

    The outputs are the logits of what is no padding, the others zero.
    """

    def draw(self) -> None:
        super().draw()
        options: Any = {"device": self.device, "generator": self.generator}
        batch, longest = self.images.shape
        lengths = torch.randint(longest // 2, longest + 1, (batch, 1), **options)
        # Labels count for nothing in padding: they tell the lengths, too.
        self.labels.masked_fill_(torch.arange(longest, device=self.device) >= lengths, IGNORED)

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        real = labels != IGNORED
        logits, loss = model(images, labels, lengths=real.sum(1, dtype=torch.int32))
        # Each part of the batch has another number of tokens that count.
        share = real.sum() / (self.labels != IGNORED).sum()
        return loss * share, logits

    def _counted(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.masked_fill((labels == IGNORED)[..., None], 0)
