"""The candidates: the published form, what a skilled user makes of it, and ours.

eager          the published computation as it is
compile        that under torch.compile
sdpa           its attention through F.scaled_dot_product_attention(w, w, w)
sdpa-cudnn     the same by that one backend of SDPA
sdpa-flash
sdpa-looped    SDPA once for each length, of packed sequences (masks.py)
crate_kernels  ours; of a model: after fuse(model)
crate_kernels-low  a model after fuse(model, memory="low")
eager-narrow   no peer but the measure of a model's errors: the published form with its tokens in
               autocast's dtype between the steps too, where ours has them (of CRATE-alpha: eager,
               for there ours adds to tokens in float32)
crate_kernels-prepared  the same after prepare_for_inference(model) too
NAME+compile   NAME under torch.compile
cublas         no peer but a yardstick for ISTA, not checked: bare GEMMs over the tokens, as many as
               ISTA cannot do without (1 forward, 2 backward; overcomplete 4 and 8)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..library import autocast_dtype
from ..models import bert, gpt
from ..models.bert import (
    ALL,
    CRATEBERT,
    BERTEmbeddings,
    BERTHead,
    BERTLayer,
    BERTOutput,
    BERTSelfAttention,
    Seen,
)
from ..models.crate import PreNorm, Transformer
from ..models.gpt import CRATEGPT, CausalBlock
from ..models.mae import MAEEncoderBlock, MaskedAutoencoder
from . import masks
from .workloads import MODELS, Workload

OURS, YARDSTICK = "crate_kernels", "cublas"
LOW, PREPARED, NARROW = f"{OURS}-low", f"{OURS}-prepared", "eager-narrow"
LOOPED = "sdpa-looped"
STEP_SIZE, LAMBD = 0.1, 0.1

# The default candidates of each suite, on CUDA and on the CPU; alpha: of models of CRATE-alpha,
# latency: of those that are captured.
CANDIDATES = {
    "cuda": {
        "core": ("eager", "sdpa-cudnn", "sdpa-flash", OURS),
        "mssa": ("eager", "sdpa+compile", OURS),
        "ista": ("eager", "compile", YARDSTICK, OURS),
        "decode": ("eager", "sdpa-cudnn", "sdpa-flash", OURS),
        "masks": ("eager", "sdpa", "sdpa+compile", "sdpa-looped", OURS),
        "model": ("eager", "sdpa+compile", OURS, LOW, f"{OURS}+compile"),
        "latency": ("sdpa+compile", OURS, PREPARED),
        "encoder": ("sdpa+compile", OURS, LOW),
        "overcomplete": ("eager", "compile", YARDSTICK, OURS),
        "alpha": ("eager", "compile", "sdpa+compile", OURS, LOW, f"{OURS}+compile"),
    },
    "cpu": {
        "core": ("eager", "sdpa", OURS),
        "mssa": ("eager", "sdpa", OURS),
        "ista": ("eager", OURS),
        "decode": ("eager", "sdpa", OURS),
        "masks": ("eager", "sdpa", "sdpa-looped", OURS),
        "model": ("eager", "sdpa", OURS),
        "encoder": ("eager", "sdpa", OURS),
        "overcomplete": ("eager", OURS),
        "alpha": ("eager", "sdpa", OURS),
    },
}
PEERS = ("eager", NARROW, "sdpa", "sdpa-cudnn", "sdpa-flash", LOOPED)
NAMES = (*PEERS, OURS, LOW, PREPARED, YARDSTICK)


def default_names(w: Workload, device_type: str) -> tuple[str, ...]:
    kind = "latency" if w.captured else w.suite
    if w.suite == "model" and MODELS[w.model].overcomplete:
        kind = "alpha"
    return CANDIDATES[device_type][kind]


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """``build_layer(workload)`` gives a function of the op's tensors; ``build_model(workload,
    model)`` turns an unfused model (which it may change) into the module to call."""

    name: str
    build_layer: Callable[[Workload], Callable[..., Tensor]]
    build_model: Callable[[Workload, nn.Module], nn.Module]
    ours: bool = False


def candidate(name: str, backend: str = "auto", compile_backend: str = "inductor") -> Candidate:
    """By name; ``backend`` is that of our ops, ``compile_backend`` torch.compile's."""
    form = "eager" if name == "compile" else name.removesuffix("+compile")
    if name not in all_names():
        raise ValueError(f"bench: expected a peer among {all_names()}, got {name!r}")
    compiled = form != name

    def finish(target: Any) -> Any:
        if not compiled:
            return target
        return torch.compile(target, backend=compile_backend, dynamic=False)

    def build_layer(w: Workload) -> Callable[..., Tensor]:
        return finish(_layer(form, w, backend))

    def build_model(w: Workload, model: nn.Module) -> nn.Module:
        return finish(_model(form, w, model))

    return Candidate(name, build_layer, build_model, ours=form in (OURS, LOW, PREPARED))


def all_names() -> tuple[str, ...]:
    return (*NAMES, "compile", *(f"{name}+compile" for name in NAMES[1:-1]))


# ---- layers


def _layer(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    if form in (LOW, PREPARED, NARROW):
        raise Unavailable(f"{form} is a form of whole models")
    if w.suite in ("ista", "overcomplete"):
        return _ista(form, w, backend)
    if form == YARDSTICK:
        raise Unavailable("a yardstick for ISTA alone")
    if w.suite == "decode":
        return _decode(form, w, backend)
    if w.suite == "masks":
        return _masks(form, w, backend)
    if form == OURS:
        from ..mssa.op import mssa as fused_mssa
        from ..mssa.op import tied_attention

        op: Callable[..., Tensor] = tied_attention if w.suite == "core" else fused_mssa

        def ours(*tensors: Tensor) -> Tensor:
            return op(*tensors, heads=w.heads, causal=w.causal, backend=backend)

        return ours
    attention = published_attention if form == "eager" else _sdpa(form, w)
    if w.suite == "core":
        return lambda t: attention(t, w.heads, w.causal)

    def mssa(x: Tensor, w_qkv: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        return F.linear(attention(F.linear(x, w_qkv), w.heads, w.causal), w_out, b_out)

    return mssa


def _masks(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    """A function of the tokens and of what tells the lengths."""
    packed = w.sequences == "packed"
    if form == OURS:
        return masks.ours(w, backend)
    if form == "eager" and packed:
        return masks.looped(lambda t: published_attention(t, w.heads, w.causal), w)
    if form == "eager":
        return masks.masked(lambda t, seen: masks.published_masked(t, w.heads, seen), w)
    if form == "sdpa":
        return masks.masked(lambda t, seen: masks.sdpa_masked(t, w.heads, seen), w)
    if form == LOOPED and packed:
        return masks.looped(lambda t: sdpa_attention(t, w.heads, w.causal), w)
    raise Unavailable(f"{form} does not take {w.sequences} sequences")


def _ista(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    wide = w.suite == "overcomplete"
    if form == "eager":
        return published_overcomplete if wide else published_ista
    if form == YARDSTICK:
        return bare_gemms if wide else bare_gemm
    if form != OURS:
        raise Unavailable("ISTA has no attention")
    from ..ista.op import ista
    from ..overcomplete_ista.op import overcomplete_ista

    op: Callable[..., Tensor] = overcomplete_ista if wide else ista
    return lambda *tensors: op(*tensors, step_size=STEP_SIZE, lambd=LAMBD, backend=backend)


def _decode(form: str, w: Workload, backend: str) -> Callable[..., Tensor]:
    """Of (new, cache, lengths, keys, values): see decode_case.py."""
    if form == OURS:
        from ..decode.op import tied_attention_decode

        def ours(new: Tensor, cache: Tensor, lengths: Tensor, *theirs: Tensor) -> Tensor:
            return tied_attention_decode(new, cache, lengths, heads=w.heads, backend=backend)

        return ours

    def attention(new: Tensor, cache: Tensor, lengths: Tensor, *theirs: Tensor) -> Tensor:
        keys, values = theirs  # (B, heads, N, head_dim)
        query = new.unflatten(-1, (w.heads, -1)).transpose(1, 2)
        if form == "eager":
            scores = torch.matmul(query, keys.mT) * w.head_dim**-0.5
            out = torch.matmul(scores.softmax(-1), values)
        else:
            with _one_of_sdpa(form, new):
                out = F.scaled_dot_product_attention(query, keys, values)
        return out.transpose(1, 2).flatten(2)

    return attention


def published_attention(w: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Per head softmax(scale w w^T) w, the score matrix in memory, as the published code has it."""
    wh = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    dots = torch.matmul(wh, wh.transpose(-1, -2)) * wh.shape[-1] ** -0.5
    if causal:
        future = torch.ones(dots.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        dots = dots.masked_fill(future, float("-inf"))
    return torch.matmul(dots.softmax(-1), wh).transpose(1, 2).flatten(2)


def published_ista(x: Tensor, weight: Tensor) -> Tensor:
    """The published three products, one gradient step and the threshold."""
    coded = F.linear(x, weight)
    descent = F.linear(x, weight.t()) - F.linear(coded, weight.t())
    return F.relu(x + (STEP_SIZE * descent - STEP_SIZE * LAMBD))


def published_overcomplete(x: Tensor, dictionary: Tensor, decoder: Tensor) -> Tensor:
    """The published four products, by einsum, with two thresholds."""
    threshold = STEP_SIZE * LAMBD
    z = F.relu(STEP_SIZE * torch.einsum("dm,btd->btm", dictionary, x) - threshold)
    error = torch.einsum("dm,btm->btd", dictionary, z) - x
    z = F.relu(z - STEP_SIZE * torch.einsum("dm,btd->btm", dictionary, error) - threshold)
    return torch.einsum("dm,btm->btd", decoder, z)


def bare_gemms(x: Tensor, dictionary: Tensor, decoder: Tensor) -> Tensor:
    """x D D^T D D1^T: four products, and by autograd eight more."""
    code = bare_gemm(x, dictionary)
    return torch.matmul(torch.matmul(torch.matmul(code, dictionary.mT), dictionary), decoder.mT)


def bare_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x W; autograd makes dy W^T and x^T dy of it: ISTA's products over the tokens."""
    if not x.is_cuda:
        raise Unavailable(f"{YARDSTICK} runs on CUDA devices")
    return torch.matmul(x, weight)


def _sdpa(form: str, w: Workload) -> Callable[..., Tensor]:
    """SDPA on one tensor as query, key and value: autograd adds the three gradients."""
    if form == "sdpa":
        return sdpa_attention
    if form == LOOPED:
        raise Unavailable(f"{form} takes sequences of several lengths")

    def attention(t: Tensor, heads: int, causal: bool = False) -> Tensor:
        with _one_of_sdpa(form, t):
            return sdpa_attention(t, heads, causal)

    return attention


def _one_of_sdpa(form: str, t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Where SDPA takes the backend that ``form`` names; any for "sdpa"."""
    named = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    if form == "sdpa":
        return contextlib.nullcontext()
    if not t.is_cuda:
        raise Unavailable(f"{form} runs on CUDA devices")
    return sdpa_kernel(named[form])


def sdpa_attention(w: Tensor, heads: int, causal: bool = False) -> Tensor:
    wh = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(wh, wh, wh, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


# ---- models


def _model(form: str, w: Workload, model: nn.Module) -> nn.Module:
    if w.model and MODELS[w.model].context:
        return _text(form, w, model)
    if form in (OURS, LOW, PREPARED):
        from ..nn import fuse, prepare_for_inference

        report = fuse(model, memory="low" if form == LOW else "default")
        if not report.replaced:
            raise RuntimeError(f"fuse replaced nothing: {report}")
        if form == PREPARED and w.mode != "forward":
            raise Unavailable(f"{form} is for inference")
        if form == PREPARED:
            prepare_for_inference(model)
    elif form == YARDSTICK:
        raise Unavailable("a yardstick for ISTA alone")
    elif form == NARROW:
        _keep_narrow(model)
    elif form != "eager":
        attention = _sdpa(form, w)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if all(hasattr(child, key) for key in ("qkv", "attend", "to_out", "heads")):
                    setattr(parent, name, SDPAAttention(child, attention))
    return model


def _keep_narrow(model: nn.Module) -> None:
    """What enters the encoder, and each norm and step of it returns, in autocast's dtype, and of
    CRATE-MAE the encoder's result."""

    def narrow(t: Tensor) -> Tensor:
        return t.to(autocast_dtype(t))

    for module in model.modules():
        if isinstance(module, MaskedAutoencoder):
            module.norm.register_forward_hook(lambda _, args, out: narrow(out))
        if not isinstance(module, (Transformer, MAEEncoderBlock)):
            continue
        module.register_forward_pre_hook(lambda _, args: (narrow(args[0]),))
        for step in module.modules():
            if isinstance(step, PreNorm):
                for part in (step, step.norm):
                    part.register_forward_hook(lambda _, args, out: narrow(out))


def _text(form: str, w: Workload, model: nn.Module) -> nn.Module:
    """Models of text are built on our ops: their peers are what they were made after."""
    if form in (LOW, PREPARED, YARDSTICK):
        raise Unavailable(f"{form} is no form of {w.model}")
    if form == OURS:
        return model
    plain = form in ("eager", NARROW)
    for module in model.modules():
        published: Any = module
        if isinstance(module, CausalBlock):
            module.__class__ = PublishedCausalBlock
            published.narrow = form == NARROW
            published.attention = published_attention if plain else _sdpa(form, w)
        if isinstance(module, BERTEmbeddings):
            module.__class__ = PublishedBERTEmbeddings
            published.narrow = form == NARROW
        if isinstance(module, BERTHead):
            module.__class__ = PublishedBERTHead
        if isinstance(module, BERTLayer):
            module.__class__ = PublishedBERTLayer
        if isinstance(module, BERTSelfAttention):
            module.__class__ = PublishedBERTAttention
            published.form = form
        if isinstance(module, BERTOutput):
            module.__class__ = PublishedBERTOutput
            published.narrow = form == NARROW
        if isinstance(module, CRATEGPT):
            module.__class__ = PublishedGPT
        if isinstance(module, CRATEBERT):
            module.__class__ = PublishedBERT
    return model


def _narrow_if(narrow: bool, t: Tensor) -> Tensor:
    return t.to(autocast_dtype(t)) if narrow else t


class PublishedGPT(CRATEGPT):
    """CRATE-GPT with torch's embeddings and loss."""

    def _reason_against_tied_embedding(self) -> str | None:
        return ""

    def _with_loss(self, x: Tensor, targets: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self._logits(x, words)
        flat = logits.flatten(0, 1)
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=gpt.IGNORED)


class PublishedBERT(CRATEBERT):
    """CRATE-BERT with torch's embeddings and loss."""

    def _reason_against_tied_embedding(self) -> str | None:
        return ""

    def _with_loss(self, x: Tensor, labels: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        flat = logits.flatten(0, 1)
        return logits, F.cross_entropy(flat, labels.flatten(), ignore_index=bert.IGNORED)


class PublishedBERTEmbeddings(BERTEmbeddings):
    """The embeddings of CRATE-BERT with torch's norm; ``narrow``: in autocast's dtype."""

    narrow: bool

    def normed(self, x: Tensor, y: Tensor | None) -> Tensor:
        return _narrow_if(self.narrow, self.LayerNorm(x if y is None else x + y))


class PublishedBERTHead(BERTHead):
    """The head of CRATE-BERT with torch's norm."""

    def normed(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer_norm(x)
        return h


class PublishedBERTLayer(BERTLayer):
    """A layer of CRATE-BERT with torch's norms and addition."""

    def forward(self, x: Tensor, seen: Seen = ALL) -> Tensor:
        return self._module_by_module(x, seen)


class PublishedBERTAttention(BERTSelfAttention):
    """The attention of CRATE-BERT as published, or by SDPA, with a mask for padding."""

    form: str

    def forward(self, x: Tensor, seen: Seen = ALL) -> Tensor:
        h = _narrow_if(self.form == NARROW, self.prenorm(x))
        w = self.qkv(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        assert seen.lengths is not None
        mask = torch.arange(x.shape[1], device=x.device) < seen.lengths[:, None]
        mask = mask[:, None, None]
        if self.form in ("eager", NARROW):
            s = torch.matmul(w, w.mT) * w.shape[-1] ** -0.5
            o = torch.matmul(s.masked_fill(~mask, torch.finfo(s.dtype).min).softmax(-1), w)
        else:
            with _one_of_sdpa(self.form, w):
                o = F.scaled_dot_product_attention(w, w, w, mask)
        return o.transpose(1, 2).flatten(2)


class PublishedBERTOutput(BERTOutput):
    """The ISTA step of CRATE-BERT as published; ``narrow``: its tokens in autocast's dtype."""

    narrow: bool

    def forward(self, x: Tensor) -> Tensor:
        u = _narrow_if(self.narrow, self.prenorm(x))
        return _narrow_if(self.narrow, published_ista(u, self.weight))


class PublishedCausalBlock(CausalBlock):
    """A layer of CRATE-GPT as published; ``narrow``: its tokens in autocast's dtype."""

    narrow: bool
    attention: Callable[..., Tensor]

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        h = self._kept(self.prenorm_1(self._kept(x)))
        o = self.attention(self.attn.c_attn(h), self.attn.heads, True)
        u = self._kept(self.prenorm_2(x + self.attn.c_proj(o)))
        return self._kept(published_ista(u, self.ista.weight))

    def _kept(self, t: Tensor) -> Tensor:
        return _narrow_if(self.narrow, t)


class SDPAAttention(nn.Module):
    """A published attention module, its core replaced by ``attention``; the same parameters."""

    def __init__(self, published: Any, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.to_out = published.qkv, published.to_out
        self.heads, self.attention = published.heads, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attention(self.qkv(x), self.heads))


def build_unfused(w: Workload, device: torch.device) -> nn.Module:
    """The published model, on ``device``, in float32, freshly initialised."""
    from .. import models

    if w.model == "crate_bert":
        return models.crate_bert(positions=514, dropout=0.0).to(device)
    if MODELS[w.model].context:
        return getattr(models, w.model)().to(device)
    name = w.model.removesuffix("_patch8")
    return getattr(models, name)(patch_size=MODELS[w.model].patch).to(device)
