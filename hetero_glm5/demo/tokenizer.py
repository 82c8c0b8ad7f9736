"""Small tokenizers with GLM-5's special tokens, for checkpoints that this project writes itself.

Byte-level BPE, learned from the text below or from the demo model's corpus, so every string round-trips; the special
tokens follow the learned ones in GLM-5's order. The same arguments always give the same file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hetero_glm5.core import UserError
from hetero_glm5.demo.corpus import KINDS, documents

EOS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # a turn has no end token of its own
PAD = "<|endoftext|>"
CONTROL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
MIN_VOCAB = 256 + len(CONTROL)
MAX_LEARNED = 2048  # more merges than the text can support only memorise it
TRAINED_VOCAB = 3072
TRAINED_DOCUMENTS, TRAINED_CHARACTERS = 4000, 2_000_000  # of each kind, at most
# A capitalised word leaves its space alone, and so does the first one of an identifier, an address or a file's name:
# what is copied to another place keeps its tokens.
WORD = r"\p{N}| ?\p{Ll}+(?![\p{L}@_/-]|\.\p{L})|\p{Lu}\p{Ll}*|[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s"

TEXT = """
A workstation has one graphics card and a great deal of ordinary memory. The card is fast and small; the memory is large
and slow. A mixture of experts fits this shape of machine well, because each token visits a few experts and leaves the
others alone. What every token needs stays on the card: attention, the shared expert and the head. What few tokens need
waits in memory, where the processor computes on it without moving it.
The first question is always the same: how many bytes does a step read, and how many bytes can the machine read in a
second? If a step takes longer than the answer, something is wrong, and it can be found by measuring one part at a time.
Please write a short function that reads a file and counts its lines. Sure, here it is:
def count_lines(path):
    with open(path, encoding="utf-8") as file:
        return sum(1 for line in file)
Thank you. Could you also tell me what the weather is like in the city today? I will look it up with the tool, and then
I can answer. It is 21 degrees and sunny, with a little wind from the west in the evening.
{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "metric": true}}
for (int row = 0; row < rows; ++row) { total += weight[row] * value[row]; }
Let me think about this step by step. First, the user wants a list. Second, the list should be sorted. Third, there must
be no duplicates in it. So the answer is: [1, 2, 3, 5, 8, 13].
One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty, thirty, a hundred, a thousand.
今天天气很好，我们去公园散步。请写一个函数，读取文件并计算行数。谢谢你的帮助，再见。
Der schnelle Fuchs springt über den faulen Hund. Où est la bibliothèque ? ¿Qué hora es? Сколько это стоит?
"""


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids, special tokens included. Raises UserError when they do not fit."""
    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(CONTROL)} special tokens need at least {MIN_VOCAB}."
        )
    learned = min(vocab_size - len(CONTROL), MAX_LEARNED)
    return _train(pre_tokenizers.ByteLevel(add_prefix_space=False), TEXT.splitlines(keepends=True), learned)


def trained_tokenizer() -> Tokenizer:
    """The demo model's tokenizer of TRAINED_VOCAB ids, learned from its corpus: a digit is one token, and a word has
    the same tokens at the start of a text, an argument or a quotation as within a sentence if it is capitalised."""
    split = pre_tokenizers.Split(Regex(WORD), "isolated")
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _train(words, _corpus(), TRAINED_VOCAB - len(CONTROL))


def _corpus() -> Iterator[str]:
    control = re.compile("|".join(map(re.escape, CONTROL)))
    for kind in KINDS:
        characters = 0
        for document in itertools.islice(documents(kind, "train", 0), TRAINED_DOCUMENTS):
            text = control.sub("\n", document.text)
            characters += len(text)
            yield text
            if characters > TRAINED_CHARACTERS:
                break


def _train(words: pre_tokenizers.PreTokenizer, text: Iterable[str], learned: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, object]:
    """tokenizer_config.json with the fields of GLM-5's."""
    return {
        "backend": "tokenizers",
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS[0],
        "pad_token": PAD,
        "model_max_length": max_length,
        "padding_side": "left",
    }
