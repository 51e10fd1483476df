"""Texts in, sentence embeddings out: a Hugging Face encoder, accelerated, over length-sorted batches of many tokens.

    encoder = pyaccel.TextEncoder.from_pretrained("path/to/all-MiniLM-L6-v2")
    embeddings = encoder.encode(texts)          # fp32 [len(texts), hidden_size], in the order of the texts

Pooling, normalization and the longest input are those of a sentence-transformers folder where it is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyaccel import checkpoints
from pyaccel.encode.batching import batches, mean_pool, padded
from pyaccel.hf.patching import accelerate
from pyaccel.hf.report import Report

Pooling = Literal["mean", "cls"]

# As many tokens keep the products of a CPU or of a GPU busy, and fit beside a model's activations.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# A tokenizer is handed so many texts at a time, which its threads share.
TEXTS_AT_ONCE = 1024


@dataclass
class TextEncoder:
    """A model, its tokenizer, and how token states become one embedding.

    Attributes:
        model: an encoder whose first output is ``last_hidden_state``.
        tokenizer: of the same checkpoint.
        pooling: "mean" over a text's tokens, or "cls": the state of the first.
        normalize: whether embeddings are divided by their L2 norm.
        max_length: tokens of a text beyond it are cut off.
        batch_tokens: about so many tokens are run at a time.
        lower_case: whether texts are lowered before they are tokenized.
        report: what pyaccel accelerated, and how its calls went.
        texts, tokens, truncated: how many were encoded so far, and how many texts were cut.
    """

    model: Any
    tokenizer: Any
    pooling: Pooling
    normalize: bool
    max_length: int
    batch_tokens: int
    lower_case: bool = False
    report: Report | None = None
    texts: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    truncated: int = field(default=0, init=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> TextEncoder:
        """Load a Hugging Face or sentence-transformers folder (or hub id), accelerated.

        What is None comes from the folder: a sentence-transformers folder says all of it; another one gets mean
        pooling, no normalization, and as many tokens as its model has positions for.

        Raises:
            pyaccel.checkpoints.CheckpointError: a ValueError: the folder can't be loaded, or it is a
                sentence-transformers folder with modules or a pooling that this doesn't compute.
            ValueError: ``max_length`` is more than the model takes.
        """
        model, tokenizer, found = checkpoints.load(folder, device=device, dtype=dtype)
        saved = _sentence_transformers(found)
        report = accelerate(model, strict=False, prepack=True)
        longest = min(tokenizer.model_max_length, max_tokens(model))
        asked = max_length or saved.get("max_length") or longest
        if asked > longest:
            raise ValueError(f"max_length {asked} is more than the {longest} tokens that the model takes")
        kind = torch.device(device).type
        return cls(
            model,
            tokenizer,
            pooling or saved.get("pooling", "mean"),
            saved.get("normalize", False) if normalize is None else normalize,
            asked,
            batch_tokens or BATCH_TOKENS.get(kind, BATCH_TOKENS["cuda"]),
            saved.get("lower_case", False),
            report,
        )

    def encode(self, texts: Sequence[str], *, done: Callable[[int], object] | None = None) -> Tensor:
        """fp32 ``[len(texts), hidden_size]`` on the CPU, in the order of ``texts``.

        The same texts in the same order give the same bits. ``done`` is called with the number of texts of each batch
        that is through.
        """
        ids = self._tokenize(texts)
        found: Tensor | None = None
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            for batch in batches([len(each) for each in ids], self.batch_tokens):
                input_ids, mask = padded([ids[index] for index in batch], self.tokenizer.pad_token_id or 0)
                embeddings = self._embed(input_ids.to(device), mask.to(device)).cpu()
                if found is None:
                    found = embeddings.new_empty(len(texts), embeddings.shape[1])
                found[batch] = embeddings
                if done is not None:
                    done(len(batch))
        self.texts += len(texts)
        self.tokens += sum(map(len, ids))
        return torch.empty(0, self.model.config.hidden_size) if found is None else found

    def _embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state.float()
        pooled = states[:, 0] if self.pooling == "cls" else mean_pool(states, mask)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[start : start + TEXTS_AT_ONCE]
            ids += self.tokenizer(self._cased(part), verbose=False, return_attention_mask=False)["input_ids"]
        too_long = [index for index, each in enumerate(ids) if len(each) > self.max_length]
        self.truncated += len(too_long)
        if too_long:  # by the tokenizer, which keeps its special tokens
            cut = self.tokenizer(
                self._cased([texts[i] for i in too_long]), truncation=True, max_length=self.max_length
            )
            for index, each in zip(too_long, cut["input_ids"], strict=True):
                ids[index] = each
        return ids

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() if self.lower_case else text for text in texts]


def max_tokens(model: Any) -> int:
    """How many tokens the model takes: of RoBERTa's positions, and its like's, the first are padding's."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings"):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return int(getattr(model.config, "max_position_embeddings", 2**30))


def _sentence_transformers(folder: Path) -> dict[str, Any]:
    """Pooling, normalization, length and case of a sentence-transformers folder; empty for another one."""
    file = folder / "modules.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = {"normalize": False}
    for kind, path in _modules(file):
        if kind == "Pooling":
            found["pooling"] = _pooling(checkpoints.read_json(folder / path / "config.json"), folder)
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer" or path:
            raise checkpoints.CheckpointError(f"{folder}: its module {kind} in {path!r} is not computed here")
    sizes = folder / "sentence_bert_config.json"
    if sizes.is_file():
        config = checkpoints.read_json(sizes)
        longest = config.get("max_seq_length")
        if longest is not None and (type(longest) is not int or longest < 1):
            raise checkpoints.CheckpointError(f"{sizes}: max_seq_length {longest!r} is no number of tokens")
        found["max_length"] = longest
        found["lower_case"] = bool(config.get("do_lower_case"))
    return found


def _modules(file: Path) -> list[tuple[str, str]]:
    """Class and path of each module. The classes are read as names, and never imported."""
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        return [(str(each["type"]).rsplit(".", 1)[-1], str(each["path"])) for each in modules]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise checkpoints.CheckpointError(f"{file} is not a list of modules with type and path") from None


def _pooling(config: dict[str, Any], folder: Path) -> str:
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if "pooling_mode" in config:
        modes = [f"pooling_mode_{config['pooling_mode']}"]
    known = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_cls": "cls",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise checkpoints.CheckpointError(
            f"{folder}: its pooling ({', '.join(modes) or 'none'}) is not computed here: mean or cls are"
        )
    return known[modes[0]]
