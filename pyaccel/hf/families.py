"""The transformers models with a fast path: which modules they are made of, and how each family names its parts.

The layer's math is written once (:mod:`pyaccel.nn.encoder_layer`), for the names of BERT. Most families have BERT's
modules under another prefix; :class:`Family` says which they are. DistilBERT and ALBERT compute the same with other
modules: their ``view`` shows a layer's modules under BERT's names. What is known of other packages' modules (peft,
FSDP2) is here too.

No model file of transformers is imported before a model of its family is there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn

from pyaccel.nn import Int8Linear, ObservedLinear

# Attention implementations: ours, and ours for a model that was made with eager attention: where gradients are recorded
# it is that one, which can be differentiated twice.
NAME = "pyaccel"
EAGER = "pyaccel_eager"
NAMES = (NAME, EAGER)

LAYERS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "LayerNorm": nn.LayerNorm, "Dropout": nn.Dropout}


def _layers_of_bert(encoder: Any) -> list[Any]:
    return list(encoder.layer)


def _as_it_is(layer: Any) -> Any:
    return layer


@dataclass(frozen=True, eq=False)
class Family:
    """What one family's encoder and layers are.

    Attributes:
        title: as the family is known.
        module: the file of transformers, below ``transformers.models``.
        encoder, layer, attention: names of classes there; ``attention`` is the one that ``layer`` calls for q, k, v.
        parts: path of each submodule of a layer -> its class, one of LAYERS or of the file.
        activation: path of the activation in a layer, which may be anything.
        output: the class of transformers.modeling_outputs that the encoder returns.
        layers: the encoder's layers in the order in which they run; a shared one comes up again.
        view: a layer with its parts under BERT's names.
        enter: what the encoder does to its input before the first layer; None: nothing.
    """

    title: str
    module: str
    encoder: str
    layer: str
    attention: str
    parts: dict[str, str] = field(repr=False)
    activation: str = "intermediate.intermediate_act_fn"
    output: str = "BaseModelOutputWithPastAndCrossAttentions"
    layers: Callable[[Any], list[Any]] = _layers_of_bert
    view: Callable[[Any], Any] = _as_it_is
    enter: Callable[[Any, Any], Any] | None = None

    @property
    def file(self) -> str:
        """Full name of the file, known without importing it."""
        return f"transformers.models.{self.module}"


class Stock:
    """The classes of a family, which importing its file of transformers gives.

    Attributes:
        family: whose they are.
        encoder, layer, attention: as in Family.
        parts: path of each submodule of a layer -> its class.
        parameters: paths of the parameters that a layer must have.
    """

    def __init__(self, family: Family) -> None:
        file = importlib.import_module(family.file)
        self.family = family
        self.encoder: type[nn.Module] = getattr(file, family.encoder)
        self.layer: type[nn.Module] = getattr(file, family.layer)
        self.attention: type[nn.Module] = getattr(file, family.attention)
        self.parts: dict[str, type[nn.Module]] = {
            path: LAYERS[name] if name in LAYERS else getattr(file, name)
            for path, name in family.parts.items()
        }
        affine = [path for path, kind in self.parts.items() if kind in (nn.Linear, nn.LayerNorm)]
        self.parameters = {f"{path}.{name}" for path in affine for name in ("weight", "bias")}


# Of a family; its file is imported when it is first asked for.
stock = functools.cache(Stock)


def _bert(title: str, module: str, prefix: str, encoder: str | None = None) -> Family:
    """A family whose modules are BERT's to the letter, but for the prefix of their names."""
    parts = {
        "attention": f"{prefix}Attention",
        "attention.self": f"{prefix}SelfAttention",
        "attention.self.query": "Linear",
        "attention.self.key": "Linear",
        "attention.self.value": "Linear",
        "attention.self.dropout": "Dropout",
        "attention.output": f"{prefix}SelfOutput",
        "attention.output.dense": "Linear",
        "attention.output.LayerNorm": "LayerNorm",
        "attention.output.dropout": "Dropout",
        "intermediate": f"{prefix}Intermediate",
        "intermediate.dense": "Linear",
        "output": f"{prefix}Output",
        "output.dense": "Linear",
        "output.LayerNorm": "LayerNorm",
        "output.dropout": "Dropout",
    }
    return Family(
        title, module, encoder or f"{prefix}Encoder", f"{prefix}Layer", f"{prefix}SelfAttention", parts
    )


# Read by encoder_layer, which asks it whether it drops: where a family has no dropout, nothing does.
_NO_DROPOUT = nn.Dropout(0.0).eval()


def _view(
    attention: Any,
    qkv: tuple[Any, Any, Any],
    heads: int,
    attention_dropout: Any,
    attention_output: tuple[Any, Any, Any],
    intermediate: tuple[Any, Any],
    output: tuple[Any, Any, Any],
    chunk_size: int,
) -> SimpleNamespace:
    """A layer's parts under BERT's names: outputs as dense, LayerNorm, dropout; intermediate as dense, activation."""
    parts = ("dense", "LayerNorm", "dropout")
    return SimpleNamespace(
        attention=SimpleNamespace(
            self=SimpleNamespace(
                **dict(zip(("query", "key", "value"), qkv, strict=True)),
                dropout=attention_dropout,
                training=attention.training,
                num_attention_heads=heads,
                attention_head_size=attention.attention_head_size,
                scaling=attention.scaling,
                is_causal=attention.is_causal,
                config=attention.config,
            ),
            output=SimpleNamespace(**dict(zip(parts, attention_output, strict=True))),
        ),
        intermediate=SimpleNamespace(dense=intermediate[0], intermediate_act_fn=intermediate[1]),
        output=SimpleNamespace(**dict(zip(parts, output, strict=True))),
        chunk_size_feed_forward=chunk_size,
        is_decoder=False,
    )


def _view_of_distilbert(layer: Any) -> SimpleNamespace:
    attention, ffn = layer.attention, layer.ffn
    return _view(
        attention,
        (attention.q_lin, attention.k_lin, attention.v_lin),
        attention.n_heads,
        attention.dropout,
        (attention.out_lin, layer.sa_layer_norm, _NO_DROPOUT),
        (ffn.lin1, ffn.activation),
        (ffn.lin2, layer.output_layer_norm, ffn.dropout),
        ffn.chunk_size_feed_forward,
    )


_DISTILBERT = Family(
    "DistilBERT",
    "distilbert.modeling_distilbert",
    encoder="Transformer",
    layer="TransformerBlock",
    attention="DistilBertSelfAttention",
    parts={
        "attention": "DistilBertSelfAttention",
        "attention.q_lin": "Linear",
        "attention.k_lin": "Linear",
        "attention.v_lin": "Linear",
        "attention.out_lin": "Linear",
        "attention.dropout": "Dropout",
        "sa_layer_norm": "LayerNorm",
        "ffn": "FFN",
        "ffn.dropout": "Dropout",
        "ffn.lin1": "Linear",
        "ffn.lin2": "Linear",
        "output_layer_norm": "LayerNorm",
    },
    activation="ffn.activation",
    output="BaseModelOutput",
    view=_view_of_distilbert,
)


def _view_of_albert(layer: Any) -> SimpleNamespace:
    attention = layer.attention
    return _view(
        attention,
        (attention.query, attention.key, attention.value),
        attention.num_attention_heads,
        attention.attention_dropout,
        (attention.dense, attention.LayerNorm, attention.output_dropout),
        (layer.ffn, layer.activation),
        # The dropout that an AlbertLayer has too is not in its forward.
        (layer.ffn_output, layer.full_layer_layer_norm, _NO_DROPOUT),
        layer.chunk_size_feed_forward,
    )


def _layers_of_albert(encoder: Any) -> list[Any]:
    groups, count = encoder.albert_layer_groups, encoder.config.num_hidden_layers
    order = (int(index / (count / encoder.config.num_hidden_groups)) for index in range(count))
    return [layer for index in order for layer in groups[index].albert_layers]


def _enter_albert(encoder: Any, hidden_states: Any) -> Any:
    return encoder.embedding_hidden_mapping_in(hidden_states)


_ALBERT = Family(
    "ALBERT",
    "albert.modeling_albert",
    encoder="AlbertTransformer",
    layer="AlbertLayer",
    attention="AlbertAttention",
    parts={
        "full_layer_layer_norm": "LayerNorm",
        "attention": "AlbertAttention",
        "attention.attention_dropout": "Dropout",
        "attention.output_dropout": "Dropout",
        "attention.query": "Linear",
        "attention.key": "Linear",
        "attention.value": "Linear",
        "attention.dense": "Linear",
        "attention.LayerNorm": "LayerNorm",
        "ffn": "Linear",
        "ffn_output": "Linear",
        "dropout": "Dropout",
    },
    activation="activation",
    output="BaseModelOutput",
    layers=_layers_of_albert,
    view=_view_of_albert,
    enter=_enter_albert,
)

FAMILIES: tuple[Family, ...] = (
    _bert("BERT", "bert.modeling_bert", "Bert"),
    _bert("RoBERTa", "roberta.modeling_roberta", "Roberta"),
    _bert("XLM-RoBERTa", "xlm_roberta.modeling_xlm_roberta", "XLMRoberta"),
    _bert("CamemBERT", "camembert.modeling_camembert", "Camembert"),
    _bert("ELECTRA", "electra.modeling_electra", "Electra"),
    _bert("ERNIE", "ernie.modeling_ernie", "Ernie"),
    _bert("RoCBert", "roc_bert.modeling_roc_bert", "RoCBert"),
    _bert("Data2VecText", "data2vec.modeling_data2vec_text", "Data2VecText"),
    _bert("BertGeneration", "bert_generation.modeling_bert_generation", "BertGeneration", "BertEncoder"),
    _DISTILBERT,
    _ALBERT,
)
BY_FILE = {family.file: family for family in FAMILIES}


def family_of(module: nn.Module) -> Family | None:
    """The family whose encoder or layer this is, by a stock class, one of ours or one derived from either."""
    for kind in type(module).__mro__:
        family = BY_FILE.get(kind.__module__)
        if family is not None and kind.__name__ in (family.encoder, family.layer):
            return family
    return None


def is_encoder(module: Any) -> bool:
    family = family_of(module)
    return family is not None and isinstance(module, stock(family).encoder)


def is_layer(family: Family, layer: nn.Module) -> bool:
    """Whether it is the family's own layer, stock or ours, or ours as FSDP2 makes it one of its own."""
    if is_sharded(layer):  # called with packed hidden states, which a stock layer doesn't know
        return getattr(type(layer).__mro__[2], "_pyaccel_family", None) is family
    kind = type(layer)
    return kind.__name__ == family.layer and (
        kind.__module__ == family.file or getattr(kind, "_pyaccel_family", None) is family
    )


def layers_of(family: Family, module: Any) -> list[Any]:
    """The layers of an encoder, or the layer that ``module`` is."""
    return family.layers(module) if is_encoder(module) else [module]


def attention_of(family: Family, layer: nn.Module) -> nn.Module:
    """The module of a layer whose mode says whether attention drops."""
    kind = stock(family).attention
    return next(module for module in layer.modules() if isinstance(module, kind))


# ---- modules of other packages ----

# Called in the place of an nn.Linear, whose rows they treat one by one: a LoRA adapter and the layer it is around.
_OPAQUE = ("peft.tuners.lora.layer.Linear",)
_FSDP_MODULES = ("torch.distributed.fsdp.FSDPModule",)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_opaque(module: nn.Module) -> bool:
    """Whether a module in a Linear's place is called, and not looked into."""
    return _name(type(module)) in _OPAQUE


def has_opaque(layer: nn.Module) -> bool:
    """Whether something in it is called, and not looked into, or does more than compute."""
    return any(is_opaque(module) or type(module) is ObservedLinear for module in layer.modules())


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 keeps its parameters: it puts them in their places before each call, by hooks of its own."""
    return _name(type(layer).__mro__[1]) in _FSDP_MODULES


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Its class, where what `encoder_layer` runs in the place of an nn.Linear counts as one."""
    return nn.Linear if type(module) in (Int8Linear, ObservedLinear) or is_opaque(module) else type(module)
