"""BERT with a head: the models that transformers calls BertForXxx, around `pyaccel.models.bert.BertModel`.

    model = BertForSequenceClassification.from_pretrained("path/to/folder")
    loss, logits = model(input_ids, attention_mask, labels=labels)

Parameters have transformers' names, so folders go both ways. Every head takes what BertModel takes (packed input too,
but for multiple choice), and `labels`; loss and logits are transformers', with two exceptions that are said where they
are made: a masked-language-model loss computes no logits of tokens that weren't masked, and padding counts for nothing
in a question-answering loss.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.activations import activation_name
from pyaccel.models import checkpoint, files
from pyaccel.models.bert import BertConfig, BertModel, BertModelOutput, activation
from pyaccel.nn import ResidualLayerNorm
from pyaccel.nn.encoder_layer import project

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "HeadOutput",
]

IGNORED = -100  # the label of what doesn't count


class HeadOutput(NamedTuple):
    loss: Tensor | None  # 0-dim; None without labels
    logits: Any  # a tensor, or a tuple of two; None where a loss made them needless


Head = TypeVar("Head", bound="BertWithHead")


class BertWithHead(nn.Module):
    """`bert`, and what a subclass puts on it."""

    needs_pooler = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=self.needs_pooler)

    def _init_head(self) -> None:
        """Initialize what is not in `bert` as BERT does; the last line of every __init__."""
        for name, module in self.named_children():
            if name != "bert":
                module.apply(self.bert._init_weights)

    @classmethod
    def from_pretrained(
        cls: type[Head], path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None
    ) -> Head:
        """Load a folder as `BertModel.from_pretrained` does, with its head.

        Where the folder has no such head (a pre-trained encoder, to be fine-tuned) the head is initialized, with
        a warning that names its parameters. Heads of other kinds in the folder are left out.

        Raises:
            FileNotFoundError, ValueError: as `BertModel.from_pretrained`; ValueError too where some parameters of the
                head are missing, or have another shape.
        """
        folder, values, weights = checkpoint.read(path_or_hub_id)
        encoder = checkpoint.load(folder, values, weights, dtype, BertModel)
        model = cls(replace(encoder.config, num_hidden_layers=0))  # its layers are the encoder's
        model.config = encoder.config
        new_pooler = model.bert.pooler if encoder.pooler is None else None
        encoder.pooler = (encoder.pooler or new_pooler) if cls.needs_pooler else None
        model.bert = encoder

        expected = {
            name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bert.")
        }
        found = {name: tensor for name, tensor in weights.items() if name in expected}
        if found:
            model.refuse_untied(weights, folder)
            files.check_weights(found, expected, folder)
            model.load_state_dict(found, strict=False)
        new = [] if found else list(expected)
        if new_pooler is not None:
            new += [f"bert.pooler.{name}" for name, _ in new_pooler.named_parameters()]
        if new:
            warnings.warn(f"{folder} has no {', '.join(new)}: newly initialized, train it", stacklevel=2)
        return model.to(encoder.embeddings.word_embeddings.weight.dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, for transformers' class of the same name too."""
        checkpoint.write(self, folder, prefix="bert.")

    def refuse_untied(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Raise ValueError for a file whose head this one can't hold."""


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(act(dense(x)))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config)
        self.LayerNorm = ResidualLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        act = self.transform_act_fn
        name = activation_name(act)
        inner = project(self.dense, hidden, name)
        out: Tensor = self.LayerNorm(inner if name else act(inner))
        return out


class BertLMPredictionHead(nn.Module):
    """The transform, and a product with the word embeddings, which are the decoder's weight."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.transform(hidden), words, self.bias)

    def loss(self, hidden: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the tokens with a label; transform and product are of those alone."""
        chosen = (labels != IGNORED).flatten().nonzero().squeeze(1)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen)
        return ops.masked_lm_cross_entropy(self.transform(rows), words, self.bias, labels.flatten()[chosen])


class BertPreTrainingHeads(nn.Module):
    """`predictions` of words, and `seq_relationship`, where there is one."""

    def __init__(self, config: BertConfig, *, predictions: bool, seq_relationship: bool) -> None:
        super().__init__()
        if predictions:
            self.predictions = BertLMPredictionHead(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _WithPredictions(BertWithHead):
    cls: BertPreTrainingHeads

    @property
    def words(self) -> Tensor:
        return self.bert.embeddings.word_embeddings.weight

    def refuse_untied(self, weights: dict[str, Tensor], folder: Path) -> None:
        for name, tied in (("weight", self.words), ("bias", weights.get("cls.predictions.bias"))):
            saved = weights.get(f"cls.predictions.decoder.{name}")
            if (
                saved is not None
                and tied is not None
                and not torch.equal(saved.to(tied.dtype), tied.to(saved.device))
            ):
                raise ValueError(
                    f"{folder}: its decoder's {name} is not that of the embeddings; only tied heads are supported"
                )


class BertForMaskedLM(_WithPredictions):
    """logits `[..., vocab]` without labels; with them the loss alone, of the tokens whose label isn't -100.

    Without any such token the loss is 0, where transformers' is NaN.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config, predictions=True, seq_relationship=False)
        self._init_head()

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> HeadOutput:
        hidden = self.bert(*args, **kwargs).last_hidden_state
        if labels is None:
            return HeadOutput(None, self.cls.predictions(hidden, self.words))
        return HeadOutput(self.cls.predictions.loss(hidden, self.words, labels), None)


class BertForPreTraining(_WithPredictions):
    """BERT's own pre-training: logits of words and of "the second sentence follows"; the loss is the sum of both.

    With labels the logits of words are None, as in BertForMaskedLM.
    """

    needs_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config, predictions=True, seq_relationship=True)
        self._init_head()

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Any,
    ) -> HeadOutput:
        hidden, pooled = self.bert(*args, **kwargs)
        follows = self.cls.seq_relationship(pooled)
        if labels is None or next_sentence_label is None:
            return HeadOutput(None, (self.cls.predictions(hidden, self.words), follows))
        loss = self.cls.predictions.loss(hidden, self.words, labels)
        return HeadOutput(loss + F.cross_entropy(follows, next_sentence_label.flatten()), (None, follows))


class BertForNextSentencePrediction(BertWithHead):
    """logits `[batch, 2]`: the second sentence follows, or not."""

    needs_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config, predictions=False, seq_relationship=True)
        self._init_head()

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> HeadOutput:
        logits = self.cls.seq_relationship(self.bert(*args, **kwargs).pooler_output)
        return HeadOutput(None if labels is None else F.cross_entropy(logits, labels.flatten()), logits)


class _WithClassifier(BertWithHead):
    """Dropout and one Linear, named `classifier`."""

    def __init__(self, config: BertConfig, n_out: int | None = None) -> None:
        super().__init__(config)
        p = config.extra.get("classifier_dropout")
        self.num_labels = n_labels(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.classifier = nn.Linear(config.hidden_size, n_out or self.num_labels)
        self._init_head()


class BertForSequenceClassification(_WithClassifier):
    """logits `[batch, num_labels]`.

    Labels int `[batch]` are classes, float `[batch, num_labels]` several of them at once; with num_labels 1 they are
    numbers, for a mean squared error. `problem_type` in config.json decides where it is there.
    """

    needs_pooler = True

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> HeadOutput:
        logits = self.classifier(self.dropout(self.bert(*args, **kwargs).pooler_output))
        return HeadOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.extra.get("problem_type")
        if kind is None:
            classes = (
                "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            )
            kind = "regression" if self.num_labels == 1 else classes
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits, labels.flatten())


class BertForMultipleChoice(_WithClassifier):
    """Padded input `[batch, choices, seq]` -> logits `[batch, choices]`; labels int `[batch]`."""

    needs_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, n_out=1)

    def forward(self, *args: Tensor | None, labels: Tensor | None = None, **kwargs: Any) -> HeadOutput:
        given = [*args, *kwargs.values()]
        shape = next((x.shape for x in given if isinstance(x, Tensor)), torch.Size())
        if len(shape) < 3 or kwargs.get("cu_seqlens") is not None:
            raise ValueError(
                f"BertForMultipleChoice: input must be [batch, choices, seq], got {tuple(shape)}"
            )

        def flat(x: Any) -> Any:
            return x.flatten(0, 1) if isinstance(x, Tensor) else x

        output = self.bert(*map(flat, args), **{name: flat(x) for name, x in kwargs.items()})
        logits = self.classifier(self.dropout(output.pooler_output)).view(shape[:2])
        return HeadOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class BertForTokenClassification(_WithClassifier):
    """logits `[..., num_labels]` of every token; labels int `[...]`, -100 where a token doesn't count."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> HeadOutput:
        logits = self.classifier(self.dropout(self.bert(*args, **kwargs).last_hidden_state))
        if labels is None:
            return HeadOutput(None, logits)
        return HeadOutput(F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits)


class BertForQuestionAnswering(BertWithHead):
    """logits of an answer's first and of its last token, `[batch, seq]` each, of padded input.

    Padding has the lowest number there is, so it is no answer and counts for nothing in the loss; transformers' loss is
    over the padding too. Positions beyond the sequence don't count.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> HeadOutput:
        output: BertModelOutput = self.bert(input_ids, attention_mask, *args, **kwargs)
        if output.last_hidden_state.dim() != 3:
            raise ValueError(
                "BertForQuestionAnswering: packed input has no positions to answer with; pass it padded"
            )
        logits = self.qa_outputs(output.last_hidden_state)
        if attention_mask is not None:
            padding = (attention_mask == 0).unsqueeze(-1)
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        start, end = logits.unbind(-1)
        if start_positions is None or end_positions is None:
            return HeadOutput(None, (start, end))
        length = start.shape[1]
        losses = [
            F.cross_entropy(scores, positions.flatten().clamp(0, length), ignore_index=length)
            for scores, positions in ((start, start_positions), (end, end_positions))
        ]
        return HeadOutput((losses[0] + losses[1]) / 2, (start, end))


def n_labels(config: BertConfig) -> int:
    """As transformers' configs say it: the length of id2label, or num_labels; 2 without either."""
    labels = config.extra.get("id2label")
    return len(labels) if labels else int(config.extra.get("num_labels") or 2)
