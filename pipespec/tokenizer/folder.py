"""The tokenizer in a model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipespec.checkpoint import eos_token_ids
from pipespec.errors import DataError, ModelLoadError
from pipespec.tokenizer.plain import ByteTokenizer, utf8
from pipespec.tokenizer.protocol import ChatMessages, TextTokenizer
from pipespec.tokenizer.vocabulary import Vocabulary


def load_tokenizer(folder: Path | None) -> TextTokenizer:
    """The tokenizer of a model folder; bytes for None, a model without files.

    Raises:
        ModelLoadError: the folder has no tokenizer that can be read.
    """
    return ByteTokenizer() if folder is None else Tokenizer(folder)


class Tokenizer:
    """A `tokenizers` tokenizer with its folder; implements `TextTokenizer`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings = _read_settings(folder)
        self._backend = _open_backend(folder)
        self._backend.no_truncation()  # files may carry what training used
        self._backend.no_padding()
        _apply_begin_and_end(self._backend, self._settings)

    @cached_property
    def num_ids(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        ids = eos_token_ids(self.folder)
        token = self._backend.token_to_id(_content(self._settings.get("eos_token")))
        return ids or (() if token is None else (token,))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        if self._backend.decoder is None or "ByteFallback" not in repr(self._backend.decoder):
            return frozenset()
        found = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(index for index in found if index is not None)

    @cached_property
    def has_chat_template(self) -> bool:
        if self._settings.get("chat_template"):
            return True
        return (self.folder / "chat_template.jinja").is_file()

    @cached_property
    def digest(self) -> str:
        return self.vocabulary().digest

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_json(json.loads(self._backend.to_str()))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        utf8(text)  # refuses what the backend would call "not a str"
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool) -> str:
        if not self.has_chat_template:
            raise DataError(
                f"{self.folder.name} has no chat template; use prompts that are plain text, or a "
                "model that was trained for chat"
            )
        from jinja2.exceptions import TemplateError

        try:
            text: str = self._chat_backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"the chat template of {self.folder.name} refuses a conversation: {reason}"
            ) from error
        return text

    @cached_property
    def _chat_backend(self) -> Any:
        return _transformers_tokenizer(self.folder)


def _open_backend(folder: Path) -> Any:
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelLoadError(f"{file} is not a tokenizer: {error}") from error
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise ModelLoadError(f"{folder} has no tokenizer.json; put the model's tokenizer there")
    backend = getattr(_transformers_tokenizer(folder), "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelLoadError(
            f"{folder} has no tokenizer.json and its tokenizer cannot be converted to one"
        )
    return backend


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(
            f"{folder}: transformers cannot load its tokenizer: {reason}"
        ) from error


def _read_settings(folder: Path) -> Mapping[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _apply_begin_and_end(backend: Any, settings: Mapping[str, Any]) -> None:
    """tokenizer_config.json may say, against tokenizer.json, which tokens frame a text. It wins, as
    in transformers, so that a prompt has the same ids here as there."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return
    from tokenizers.processors import TemplateProcessing

    frame = {}
    for name in ("bos", "eos"):
        token = _content(settings.get(f"{name}_token"))
        if settings.get(f"add_{name}_token") and backend.token_to_id(token) is not None:
            frame[name] = token
    parts = [frame.get("bos"), "$A", frame.get("eos")]
    backend.post_processor = TemplateProcessing(
        single=[part for part in parts if part],
        special_tokens=[(token, backend.token_to_id(token)) for token in frame.values()],
    )


def _content(token: Any) -> str:
    """A token as tokenizer_config.json writes it: a text, or an object with its flags."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")
