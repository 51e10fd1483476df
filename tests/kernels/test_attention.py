"""Attention's launchers: in every configuration they write what they should, all of it, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel.kernels.attention import config
from pyaccel.kernels.attention import dkv as attention_dkey_dvalue
from pyaccel.kernels.attention import dq as attention_dquery
from pyaccel.kernels.attention import forward as attention
from pyaccel.kernels.attention import scores as attention_scores
from pyaccel.kernels.attention import short as attention_short
from pyaccel.kernels.attention.config import AttentionConfig, AttentionShape
from pyaccel.kernels.attention.params import AttentionCall
from pyaccel.kernels.common.device import device_info
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic
from tests.ops.attention_cases import NAN, in_order, offsets, random_gradient, values

F32, BF16 = torch.float32, torch.bfloat16
Alloc = Callable[..., Tensor]
KERNELS = ("forward", "forward_short", "dquery", "dkey_dvalue", "backward_short", "scores")


def choose(kernel: str, shape: AttentionShape) -> AttentionConfig | None:
    return (config.attention_short if kernel.endswith("_short") else config.attention)(kernel, shape)


def make_call(
    device: torch.device,
    lengths: tuple[int, int],
    *,
    dtype: torch.dtype = F32,
    heads: tuple[int, int, int] = (1, 2, 1),
    dims: tuple[int, int] = (20, 24),
    **options: Any,
) -> AttentionCall:
    """Of a padded batch: heads are batch, heads and key heads; in memory heads are inside, as a Linear leaves them."""
    (batch, n_heads, kv_heads), (seq_q, seq_k) = heads, lengths
    shapes = ((n_heads, seq_q, dims[0]), (kv_heads, seq_k, dims[0]), (kv_heads, seq_k, dims[1]))
    query, key, value = (in_order(values(batch, *s, device=device).to(dtype), 0, 2, 1, 3) for s in shapes)
    usual = {
        "cu_seqlens_q": None, "cu_seqlens_k": None, "key_mask": None, "attn_mask": None, "is_causal": False,
        "window_size": (-1, -1), "scale": dims[0] ** -0.5, "dropout_key": None, "dropout_p": 0.0, "allow_tf32": False,
    }  # fmt: skip
    return AttentionCall(query, key, value, seq_q=seq_q, seq_k=seq_k, **{**usual, **options})


def packed(call: AttentionCall, lens_q: list[int], lens_k: list[int]) -> AttentionCall:
    """The call of sequences of these lengths that lie one behind the other in its rows."""
    cu_q, cu_k = (offsets(lens, call.query.device) for lens in (lens_q, lens_k))
    return call._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seq_q=max(lens_q), seq_k=max(lens_k))


def define(call: AttentionCall, dout: Tensor, dlse: Tensor, upcast: bool) -> dict[str, Tensor]:
    """What the reference makes of a call."""
    dtype = torch.float64 if upcast else call.query.dtype
    given = [t.detach().to(dtype).requires_grad_() for t in (call.query, call.key, call.value)]
    options = {
        "dropout_p": call.dropout_p, "is_causal": call.is_causal, "scale": call.scale, "dropout_key": call.dropout_key,
        "window_size": call.window_size, "return_lse": True, "upcast": upcast,
    }  # fmt: skip
    if call.packed:
        rows = [t.squeeze(0).transpose(0, 1) for t in given]
        out, lse = reference.varlen_attention(
            *rows, call.cu_seqlens_q, call.cu_seqlens_k, call.seq_q, call.seq_k, **options
        )
        out, lse = out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)
    else:
        keys = None if call.key_mask is None else call.key_mask[:, 0]
        mask = call.attn_mask
        if mask is not None:
            mask = mask.detach().to(torch.float64 if upcast else mask.dtype).requires_grad_()
            given.append(mask)
        out, lse, probs = reference.scaled_dot_product_attention(
            *given[:3], mask, enable_gqa=True, key_padding_mask=keys, return_probs=True, **options
        )
    grads = torch.autograd.grad([out, lse], given, [dout.to(out.dtype), dlse.to(lse.dtype)])
    found = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "dmask"), grads, strict=False))}
    return found if call.packed else {**found, "probs": probs}


class Launch:
    """Launches kernels of one call into guarded outputs, full of NaN, and judges what they wrote."""

    def __init__(self, call: AttentionCall, empty: Alloc, row_gap: int = 0) -> None:
        self.call, self.empty, self.row_gap = call, empty, row_gap
        self.dout = random_gradient(call.query[..., :1].expand(*call.query.shape[:3], call.value.shape[3]))
        self.dlse = torch.randn(call.query.shape[:3], device=call.query.device)
        self.truth, self.naive = (define(call, self.dout, self.dlse, upcast) for upcast in (True, False))
        # What one kernel reads and another one wrote.
        self.out, self.lse = self.naive["out"].detach(), self.truth["lse"].float().detach()
        is_float = call.attn_mask is not None and call.attn_mask.dtype != torch.uint8
        # Beside the lowest number fp64 can't hold the logarithm either.
        self.lowest = (self.lse < -1e30) & self.lse.isfinite()
        error = (self.truth["lse"] - self.lse).float().nan_to_num(0.0).detach()
        self.error = error.masked_fill(self.lowest, math.log(call.seq_k)) if is_float else None
        delta = (self.dout.double() * self.out.double()).sum(-1) - self.dlse
        self.exact_delta = delta.masked_fill(self.lse == -torch.inf, 0.0)
        self.delta = self.exact_delta.float()

    def like(self, x: Tensor, dim: int | None = None) -> Tensor:
        """An output laid out as the ops' are, heads inside; row_gap elements after each row are guards too."""
        batch, heads, seq, own = x.shape
        shape, gap = (batch, seq, heads, dim or own), 0 if self.call.packed else self.row_gap
        return self.empty(shape, dtype=x.dtype, device=x.device, row_gap=gap).transpose(1, 2)

    def judge(self, **found: Tensor) -> None:
        for name, t in found.items():
            assert not t.isnan().any(), f"{name}: not everything was written"
            if name == "lse":
                assert_statistic(t, self.truth["lse"], scale=16.0, name=name)
            else:
                dtype = self.call.query.dtype  # a mask's gradient too is made of such products
                assert_close_to_truth(t.to(dtype), self.truth[name], self.naive[name].to(dtype), name=name)

    def forward(self, settings: AttentionConfig) -> None:
        self._forward(attention.forward, settings)

    def forward_short(self, settings: AttentionConfig) -> None:
        self._forward(attention_short.forward_short, settings)

    def _forward(self, launch: Callable[..., None], settings: AttentionConfig) -> None:
        out, lse = self.like(self.call.query, self.call.value.shape[3]), self.like_lse()
        error = None if self.error is None else self.like_lse()
        launch(out, lse, error, self.call, settings)
        self.judge(out=out, lse=lse)
        if error is not None and self.error is not None:
            assert (
                error.abs() <= 8.0 * torch.finfo(F32).eps * (lse.abs().nan_to_num(0.0, posinf=0.0) + 16.0)
            ).all()
            assert_statistic(error[self.lowest], self.error[self.lowest].double(), scale=16.0, name="error")

    def dquery(self, settings: AttentionConfig) -> None:
        dq, delta = self.like(self.call.query), self.like_lse()
        attention_dquery.dquery(
            dq, delta, self.dout, self.out, self.lse, self.error, self.dlse, self.call, settings
        )
        self.judge(dq=dq)
        written = self.lse != -torch.inf
        naive = (self.dout.float() * self.out.float()).sum(-1) - self.dlse
        assert_close_to_truth(delta[written], self.exact_delta[written], naive[written], name="delta")

    def dkey_dvalue(self, settings: AttentionConfig) -> None:
        dk, dv = self.like(self.call.key), self.like(self.call.value)
        attention_dkey_dvalue.dkey_dvalue(
            dk, dv, self.dout, self.lse, self.error, self.delta, self.call, settings
        )
        self.judge(dk=dk, dv=dv)

    def backward_short(self, settings: AttentionConfig) -> None:
        dq, dk, dv = (self.like(t) for t in (self.call.query, self.call.key, self.call.value))
        attention_short.backward_short(
            dq, dk, dv, self.dout, self.out, self.lse, self.error, self.dlse, self.call, settings
        )
        self.judge(dq=dq, dk=dk, dv=dv)

    def scores(self, settings: AttentionConfig) -> None:
        call = self.call
        probs = self.empty(
            (*call.query.shape[:3], call.seq_k), dtype=call.query.dtype, device=call.query.device
        )
        attention_scores.probs(probs, self.lse, call, settings)
        # The LSE alone says nothing of the weights beside the lowest number.
        for results in (self.truth, self.naive):
            results["probs"] = results["probs"].masked_fill(self.lowest[..., None], 0.0)
        assert not probs.isnan().any(), "probs: not everything was written"
        self.judge(probs=probs.masked_fill(self.lowest[..., None], 0.0))
        if call.attn_mask is not None:
            shape = [
                1 if stride == 0 else n
                for n, stride in zip(call.attn_mask.shape, call.attn_mask.stride(), strict=True)
            ]
            dmask = self.empty(shape, dtype=call.attn_mask.dtype, device=call.query.device)
            attention_scores.dmask(dmask, self.dout, self.lse, self.error, self.delta, call, settings)
            dims = [i for i, n in enumerate(shape) if n != call.attn_mask.shape[i]]
            for results in (self.truth, self.naive):
                results["dmask"] = results["dmask"].sum(dims, keepdim=True) if dims else results["dmask"]
            self.judge(dmask=dmask)

    def like_lse(self) -> Tensor:
        return self.empty(tuple(self.lse.shape), device=self.lse.device)


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_of_the_outputs_is_written_and_nothing_else(
    kernel: str, dtype: torch.dtype, device: torch.device, guarded_empty: Alloc
) -> None:
    """Rows with guards between them; lengths and dims that fill no tile; a sequence without keys."""
    heads = (2, 3, 3) if kernel == "backward_short" else (2, 4, 2)
    keys = torch.arange(41, device=device) < torch.tensor([[0], [37]], device=device)
    options: dict[str, Any] = {"key_mask": keys[:, None].expand(2, heads[1], 41)}
    if kernel == "scores":
        options["attn_mask"] = torch.randn(1, heads[1], 35, 41, device=device).expand(2, -1, -1, -1)
    call = make_call(device, (35, 41), dtype=dtype, heads=heads, **options)
    settings = choose(kernel, call.shape)
    assert settings is not None
    getattr(Launch(call, guarded_empty, row_gap=3), kernel)(settings)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "scores"])
def test_all_of_a_packed_batch_is_written_and_nothing_else(
    kernel: str, device: torch.device, guarded_empty: Alloc
) -> None:
    """Empty sequences, and rows beyond the last offset, more than one program clears at a time."""
    call = make_call(device, (90, 95), heads=(1, 2, 2 if kernel == "backward_short" else 1))
    call = packed(call, [9, 0, 35, 4, 0], [20, 3, 40, 0, 0])
    settings = choose(kernel, call.shape)
    assert settings is not None
    getattr(Launch(call, guarded_empty), kernel)(settings)


# --- every option -------------------------------------------------------------------------------------------


OPTIONS = [
    (kernel, option)
    for kernel in KERNELS
    for option in ("window", "causal", "negative scale", "key mask", "mask", "lowest", "dims strided")
    # Beside an attn_mask the other backward kernels serve every length.
    if not (kernel == "backward_short" and option in ("mask", "lowest"))
]


def options_of(name: str, heads: int, lengths: tuple[int, int], device: torch.device) -> dict[str, Any]:
    if name == "window":
        return {"window_size": (5, 3)}
    if name == "causal":
        return {"is_causal": True}
    if name == "negative scale":
        return {"scale": -0.3}
    if name == "key mask":
        return {"key_mask": (torch.arange(lengths[1], device=device) % 3 > 0).expand(2, heads, -1)}
    if name == "mask":
        mask = torch.randn(2, heads, *lengths, device=device)
        mask[torch.rand_like(mask) < 0.3] = -torch.inf
        mask[..., ::3] = -torch.inf
        mask[..., 4, :] = -torch.inf
        mask[..., :32, 32:] = -torch.inf
        return {"attn_mask": mask}
    if name == "lowest":
        mask = torch.zeros(2, heads, *lengths, device=device)
        mask[:, :, ::2] = torch.finfo(F32).min
        return {"attn_mask": mask}
    return {}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kernel", "option"), OPTIONS)
def test_every_option_is_right(
    kernel: str, option: str, dtype: torch.dtype, device: torch.device, guarded_empty: Alloc
) -> None:
    """On several tiles; keys and values that no query attends to are NaN when the kernel sees them."""
    heads, lengths = (2, 2, 2 if kernel == "backward_short" else 1), (38, 45)
    options = options_of(option, heads[1], lengths, device)
    if kernel == "scores":
        options.setdefault("attn_mask", torch.randn(1, 1, *lengths, device=device).expand(2, 2, -1, -1))
    call = make_call(device, lengths, dtype=dtype, heads=heads, **options)
    if option == "dims strided":
        strided = {name: in_order(getattr(call, name), 0, 1, 3, 2) for name in ("query", "key", "value")}
        call = call._replace(**strided)
    settings = choose(kernel, call.shape)
    assert settings is not None
    launch = Launch(call, guarded_empty)
    unread = {
        "window": slice(0, 2),
        "causal": slice(38, None),
        "key mask": slice(0, None, 3),
        "mask": slice(0, None, 3),
    }
    if option in unread:
        poisoned = {name: getattr(call, name).clone() for name in ("key", "value")}
        for t in poisoned.values():
            t[:, :, unread[option]] = NAN
        launch.call = call._replace(**poisoned)
    for skip_masked in {settings.skip_masked, option != "mask"}:
        getattr(launch, kernel)(dataclasses.replace(settings, skip_masked=skip_masked))


@pytest.mark.parametrize("kernel", ["forward", "forward_short"])
def test_a_score_that_is_masked_may_be_nan(kernel: str, device: torch.device, guarded_empty: Alloc) -> None:
    """Where another query of the tile attends to the key."""
    mask = torch.zeros(1, 2, 20, 45, device=device)
    mask[:, :, 1:, 7] = -torch.inf
    call = make_call(device, (20, 45), attn_mask=mask)
    settings = choose(kernel, call.shape)
    assert settings is not None
    key = call.key.clone()
    key[:, :, 7] = NAN
    launch = Launch(call, guarded_empty)
    found = []
    for changed in (call, call._replace(key=key)):
        out, lse, error = launch.like(call.query, 24), launch.like_lse(), launch.like_lse()
        getattr(attention if kernel == "forward" else attention_short, kernel)(
            out, lse, error, changed, settings
        )
        found.append((out[:, :, 1:], lse[:, :, 1:], error[:, :, 1:]))
    for a, b in zip(*found, strict=True):
        assert_bits_equal(a, b)


# --- every configuration ------------------------------------------------------------------------------------


def shipped(
    kernel: str, device: torch.device, extras: bool
) -> list[tuple[int, torch.dtype, AttentionConfig]]:
    """Configurations that cut scores differently, each with a head_dim and dtype it is for.

    Of all architectures under the interpreter, which can run every one; of the device's own, for calls with dropout
    or without, on a device.
    """
    arch = device_info(device).arch
    everything = arch == "interpreter"
    found: dict[Any, tuple[int, torch.dtype, AttentionConfig]] = {}
    for name, dim, dtype, seq, dropout in itertools.product(
        ("interpreter", "sm_80", "sm_90", "gfx942") if everything else (arch,), (32, 64, 128, 256), (BF16, F32),
        (20, 48, 96, 1000), (False, True) if everything else (extras,),
    ):  # fmt: skip
        settings = choose(kernel, AttentionShape(seq, seq, dim, dtype.itemsize, name, 1, False, dropout))
        if settings is not None:
            cut = (settings.block_m, settings.block_n, settings.tiles, settings.split)
            found.setdefault(cut, (dim, dtype, settings))
    return list(found.values())


def cut_name(settings: AttentionConfig) -> str:
    return f"{settings.tiles} x " * bool(settings.tiles) + f"{settings.block_m}x{settings.block_n}"


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "causal and dropout"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_is_right(
    kernel: str, extras: bool, device: torch.device, guarded_empty: Alloc
) -> None:
    """Also those that no machine of a GPU-free run would choose: a tile's size must not matter."""
    for dim, dtype, settings in shipped(kernel, device, extras):
        seq_q, seq_k = settings.block_m + 5, 2 * settings.block_n + 7
        if kernel == "forward_short":
            seq_k = settings.block_n - 3
        elif kernel == "backward_short":
            seq_q = settings.block_m - 3
        options: dict[str, Any] = {}
        if extras and kernel != "scores":
            options = {"is_causal": True, "dropout_key": dropout_key(device), "dropout_p": 0.2}
        elif extras:
            options["attn_mask"] = torch.randn(1, 2, seq_q, seq_k, device=device)
        call = make_call(
            device, (seq_q, seq_k), heads=(1, 2, 2 if kernel == "backward_short" else 1),
            dims=(20, 24) if device.type == "cpu" else (dim, dim), dtype=dtype, **options,
        )  # fmt: skip
        try:
            getattr(Launch(call, guarded_empty), kernel)(settings)
        except AssertionError as error:
            raise AssertionError(f"{cut_name(settings)}: {error}") from error


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lens", [None, ([40, 0, 30], [50, 3, 42])], ids=["padded", "packed"])
def test_copies_by_descriptor_give_the_same_bits(
    lens: tuple[list[int], list[int]] | None, causal: bool, device: torch.device, guarded_empty: Alloc
) -> None:
    """And read no key that doesn't count: those beyond the causal reach and the last offset are NaN."""
    call = make_call(device, (70, 101), dtype=BF16, dims=(40, 32), is_causal=causal)
    if lens is not None:
        call = packed(call, *lens)
        call.key[..., 95:, :] = NAN
        call.value[..., 95:, :] = NAN
    elif causal:
        call.key[..., 70:, :] = NAN
        call.value[..., 70:, :] = NAN
    settings = config.attention("forward", dataclasses.replace(call.shape, seq_q=500, seq_k=500))
    found = []
    for tma in (False, True):
        assert call.tma_can_read(call.key, call.value)
        launch = Launch(call, guarded_empty)
        out, lse = launch.like(call.query, 32), launch.like_lse()
        attention.forward(out, lse, None, call, dataclasses.replace(settings, tma=tma))
        launch.judge(out=out, lse=lse)
        found.append((out, lse))
    for a, b in zip(*found, strict=True):
        assert_bits_equal(a, b)


def test_descriptors_are_not_made_of_what_they_cannot_read(device: torch.device) -> None:
    call = make_call(device, (20, 30), dtype=BF16, dims=(32, 32))
    assert call.tma_can_read(call.key, call.value)
    keys = torch.ones(1, 2, 30, dtype=torch.bool, device=device)
    for change in (
        {"key_mask": keys}, {"attn_mask": keys[:, :, None].expand(1, 2, 20, 30)}, {"window_size": (3, -1)},
    ):  # fmt: skip
        other = call._replace(**change)
        assert not other.tma_can_read(call.key, call.value), change
    for bad in (call.key.mT.contiguous().mT, call.key[..., 1:], torch.cat([call.key, call.key[..., :1]], -1)):
        assert not call.tma_can_read(call.key, bad)


def test_configurations_are_values_that_serve_every_call() -> None:
    """Pure functions of the shape: the tiled kernels always have one, the short ones one that is large enough."""
    for arch in ("interpreter", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"):
        for dim, itemsize, seq, extras in itertools.product(
            (1, 64, 65, 255, 256), (2, 4), (1, 64, 65, 128, 129, 9999), (False, True)
        ):
            shape = AttentionShape(seq, seq, dim, itemsize, arch, 1, extras, extras)
            for kernel in KERNELS:
                settings = choose(kernel, shape)
                assert settings == choose(kernel, dataclasses.replace(shape))
                if settings is None:
                    assert kernel.endswith("_short")
                    continue
                assert {hash(settings), hash(dataclasses.replace(settings))} == {hash(settings)}
                for block in (settings.block_m, settings.block_n):
                    assert block >= 16
                    assert block.bit_count() == 1
                assert kernel != "forward_short" or settings.block_n >= seq
                assert kernel != "backward_short" or settings.block_m >= seq
