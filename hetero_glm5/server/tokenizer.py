"""Text to token ids and back, and what a checkpoint's folder says about prompts and sampling.

GLM-5's tokenizer is byte-level BPE: each token stands for bytes, and every character of its spelling for one byte. So
text is the tokens' bytes decoded as UTF-8, and a stream is an incremental UTF-8 decoder. Special tokens stay visible:
the output parsers need `<think>` and its like.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from hetero_glm5.core import PromptTooLong, RequestError, SamplingParams, UserError
from hetero_glm5.model_config import read_json
from hetero_glm5.server.chat_template import ChatTemplate

log = logging.getLogger(__name__)

_NO_EFFECT: dict[str, tuple[Any, ...]] = {  # keys of generation_config.json: the values that ask for nothing
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "guidance_scale": (1,),
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _spelt(spelling: str) -> bytes:
    """What a token stands for."""
    if all(character in _BYTE_OF for character in spelling):
        return bytes(_BYTE_OF[character] for character in spelling)
    return spelling.encode()  # an added token in plain text


@dataclass(frozen=True)
class SamplingDefaults:
    """generation_config.json: what a request that names no value gets."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(cls, folder: str | Path) -> SamplingDefaults:
        path = Path(folder) / "generation_config.json"
        data = read_json(path, "the sampling defaults cannot be read") if path.exists() else {}
        names = [f.name for f in dataclasses.fields(cls)]
        values = {name: data[name] for name in names if data.get(name) is not None}
        samples = data.get("do_sample")
        if not isinstance(samples, bool | None):
            raise UserError(f"{path}: do_sample is {samples!r}; it must be true or false.")
        if samples is False:
            values["temperature"] = 0.0
        ignored = [key for key, neutral in _NO_EFFECT.items() if data.get(key) not in (None, *neutral)]
        if ignored:
            log.info("%s: %s: no effect in this server.", path, ", ".join(f"{key} {data[key]}" for key in ignored))
        try:
            SamplingParams(**values)
        except RequestError as error:
            raise UserError(f"{path}: {error}") from error
        return cls(**values)


class Tokenizer:
    """A checkpoint's tokenizer.json and chat template. Safe to use from several threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None = None):
        self._tokenizer, self._template = tokenizer, template
        self._bytes = {token: _spelt(spelling) for spelling, token in tokenizer.get_vocab().items()}
        self._longest = max(map(len, self._bytes.values()), default=1)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, if there is one, the chat template. Raises UserError."""
        path = Path(folder) / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The tokenizer cannot be read: {path}: {getattr(error, 'strerror', error)}.") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer: {error}. Is the file complete?") from error
        if "ByteLevel" not in json.dumps(json.loads(text).get("decoder")):
            raise UserError(f"{path}: GLM-5's tokenizer is byte-level BPE, and this one has no ByteLevel decoder.")
        return cls(tokenizer, ChatTemplate.from_folder(Path(folder)))

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        """Token ids; special tokens spelled in the text become themselves, and none is added.

        Raises RequestError for what is no Unicode text, and for a text that cannot fit into `context_length` tokens
        even if each were the longest one: that much takes long to encode.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise RequestError(
                f"the prompt holds {half} at character {error.start}, half a surrogate pair; send whole characters.",
                "prompt",
            ) from error
        if context_length is not None and size > context_length * self._longest:
            raise PromptTooLong(
                f"the prompt has {size} bytes; the context length is {context_length} tokens of at most "
                f"{self._longest} bytes. Shorten the prompt.",
                "prompt",
            )
        # Unlike encode(), this lets other threads run meanwhile.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, tokens: list[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def to_str(self) -> str:
        """The text of its tokenizer.json."""
        return self._tokenizer.to_str()

    def stream(self) -> TextStream:
        return TextStream(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for an id without a token (GLM-5 pads its vocabulary)."""
        return self._bytes.get(token, b"")

    def render_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, /, **kwargs: Any) -> str:
        """The prompt for a chat. `kwargs` reach the template; clear_thinking is False unless given. RequestError."""
        if self._template is None:
            raise RequestError("This checkpoint has no chat template. Use /v1/completions with a whole prompt.")
        return self._template.render(messages, tools, kwargs)


class TextStream:
    """Token ids in, whole UTF-8 characters out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """New text; empty while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What an incomplete character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
