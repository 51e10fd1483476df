"""A linear layer in int8, one class for training and for deployment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.reference.int8 import dequantize

Method = Literal["dynamic", "static", "weight_only"]
METHODS: tuple[Method, ...] = ("dynamic", "static", "weight_only")


class Int8Linear(nn.Module):
    """``x @ weight^T + bias`` with x and weight, or weight alone, in int8: the same bits in training and deployed.

    A floating ``weight`` is trainable: every forward quantizes it by a scale for each output channel, and gradients are
    straight-through (:func:`pyaccel.ops.int8_linear`). :meth:`freeze` puts the int8 codes in its place, beside their
    ``weight_scale``; :meth:`unfreeze` goes back.

    Args:
        in_features, out_features, bias, device, dtype: as of ``nn.Linear``.
        method: ``"dynamic"`` quantizes each token around the middle of its own range, ``"static"`` all of them
            symmetrically, by ``input_scale``, and ``"weight_only"`` none: the weight takes a quarter of fp32's bytes
            and products are of x's dtype.

    Attributes:
        weight: Parameter ``[out_features, in_features]``, floating or int8.
        bias: Parameter ``[out_features]`` or None.
        weight_scale: fp32 ``[out_features]``; None while the weight is floating.
        input_scale: fp32 scalar, with "static"; 1 until it is calibrated.
        smooth_scale: fp32 ``[in_features]`` or None: multiplies x before it is quantized (SmoothQuant,
            arXiv:2211.10438, where it can't be folded into what comes before).

    The scales stay fp32 whatever dtype the module is cast to, and an int8 weight stays int8. State dict: ``weight``,
    ``bias``, ``weight_scale``, ``input_scale``, ``smooth_scale``, those there are; it loads frozen into trainable and
    the other way round, and the module becomes what was saved.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor | None
    input_scale: Tensor | None
    smooth_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        method: Method = "dynamic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Int8Linear: unknown method {method!r}: expected one of {', '.join(METHODS)}")
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.method = method
        # nn.Linear's own initialization
        like = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight = cast(nn.Parameter, like.weight)
        self.bias = cast(nn.Parameter | None, like.bias)
        self.register_buffer("weight_scale", None)
        self.register_buffer("input_scale", torch.ones((), device=device) if method == "static" else None)
        self.register_buffer("smooth_scale", None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, method: Method = "dynamic", input_scale: Tensor | float | None = None
    ) -> Int8Linear:
        """A trainable Int8Linear with the very Parameters of ``linear``.

        Raises ValueError for an ``input_scale`` without "static", or that isn't above 0.
        """
        if method in METHODS and (input_scale is not None) != (method == "static"):
            raise ValueError(
                f"Int8Linear: method 'static' needs an input_scale and the others have none; "
                f"got {method!r} and {input_scale}"
            )
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, method=method, device="meta"
        )
        module.weight = cast(nn.Parameter, linear.weight)
        module.bias = cast(nn.Parameter | None, linear.bias)
        if input_scale is not None:
            scale = torch.as_tensor(input_scale, dtype=torch.float32)
            if scale.dim() or not bool(scale > 0):
                raise ValueError(f"Int8Linear: input_scale must be a scalar above 0, got {input_scale}")
            module.input_scale = scale.to(linear.weight.device)
        module.training = linear.training
        return module

    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the weight as it is (dequantized where frozen), for x as it comes."""
        dtype = self._float_dtype()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        weight = self.weight
        if self.is_frozen or self.smooth_scale is not None:
            with torch.no_grad():
                values = self._dequantized()
                if self.smooth_scale is not None:
                    values = values * self.smooth_scale
            weight = nn.Parameter(values.to(dtype))
        linear.weight = weight
        linear.bias = cast(nn.Parameter, self.bias)
        linear.training = self.training
        return linear

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is int8 codes."""
        return self.weight.dtype == torch.int8

    @torch.no_grad()
    def freeze(self) -> Int8Linear:
        """Put int8 codes in the place of the weight, in place; the forward stays the same, bit for bit."""
        if not self.is_frozen:
            codes, scale = ops.quantize_per_channel(self.weight)
            self._float = self.weight.dtype
            self.weight, self.weight_scale = nn.Parameter(codes, requires_grad=False), scale
        return self

    @torch.no_grad()
    def unfreeze(self, dtype: torch.dtype | None = None) -> Int8Linear:
        """Make the weight trainable again, from what its codes stand for; in the bias's dtype by default."""
        if self.is_frozen:
            values = self._dequantized().to(dtype or self._float_dtype())
            self.weight, self.weight_scale = nn.Parameter(values), None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]`` in x's dtype, or autocast's."""
        return self.linear_activation(x, None)

    def linear_activation(self, x: Tensor, activation: str | None) -> Tensor:
        """The same with an activation in the product's epilogue: see :func:`pyaccel.ops.int8_linear`."""
        return ops.int8_linear(
            x,
            self.weight,
            self.bias,
            activation,
            weight_scale=self.weight_scale,
            input_scale=self.input_scale,
            smooth_scale=self.smooth_scale,
            weight_only=self.method == "weight_only",
        )

    def _dequantized(self) -> Tensor:
        if self.weight_scale is None:
            return self.weight.float()
        return dequantize(self.weight, self.weight_scale)

    _float: torch.dtype | None = None

    def _float_dtype(self) -> torch.dtype:
        if not self.is_frozen:
            return self.weight.dtype
        return self.bias.dtype if self.bias is not None else self._float or torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """``to``, ``half``, ``cuda`` ... : scales move, but stay what they are; a rounded scale is another layer."""
        scales = {name: getattr(self, name) for name in _SCALES}
        for name in _SCALES:
            setattr(self, name, None)
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None:
                moved = fn(scale)
                same = moved.dtype == scale.dtype
                setattr(self, name, moved if same else _moved(scale, moved))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and (saved.dtype == torch.int8) != self.is_frozen:
            device = self.weight.device
            if saved.dtype == torch.int8:
                self._float = self.weight.dtype
                self.weight = nn.Parameter(torch.empty_like(saved, device=device), requires_grad=False)
            else:
                dtype = self._float_dtype()
                self.weight = nn.Parameter(torch.empty_like(saved, device=device, dtype=dtype))
        for name in _SCALES:
            scale = state_dict.get(f"{prefix}{name}")
            if scale is None:
                # A "static" module needs its input_scale: one that lacks is an error, below.
                if name != "input_scale":
                    setattr(self, name, None)
            elif getattr(self, name) is None and not (name == "input_scale" and self.method != "static"):
                empty = torch.empty_like(scale, device=self.weight.device, dtype=torch.float32)
                setattr(self, name, empty)
        if self.is_frozen and self.weight_scale is None:  # named as missing by the superclass
            self.weight_scale = torch.ones(self.out_features, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        state = "int8" if self.is_frozen else f"{str(self.weight.dtype).removeprefix('torch.')}, trainable"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, method={self.method!r}, {state}"


_SCALES = ("weight_scale", "input_scale", "smooth_scale")


def _moved(scale: Tensor, like: Tensor) -> Tensor:
    """``scale`` where ``like`` is, in its own dtype."""
    return torch.empty_like(scale, device=like.device) if like.is_meta else scale.to(like.device)
