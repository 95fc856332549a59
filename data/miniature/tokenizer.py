"""A byte-pair vocabulary for the miniature's words, in both layouts that the scorers read.

Hugging Face reads `vocab.json` and `merges.txt`, open_clip a gzipped list of merges. Both give
the same ids: bytes, bytes that end a word, merges, begin of text, end of text. The bytes are
mapped to printable characters as GPT-2 and CLIP do; any other sentence falls apart into letters.
"""

import gzip
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from data.miniature import scenes

CONTEXT = 16
"""Tokens of a text at most, begin and end included; a prompt of this world has 13."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def merges() -> list[tuple[str, str]]:
    """Merges that make every word of the world one token, most frequent pair first."""
    words = {word for scene in scenes.all_scenes() for word in scene.prompt.split()}
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in sorted(words)]
    merged_pairs: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in zip(word, word[1:], strict=False))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merged_pairs.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merged_pairs


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _byte_letters() -> list[str]:
    """One printable character per byte, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = range(256, 256 + 256 - len(printable))
    return [chr(code) for code in [*printable, *spare]]


def vocabulary() -> dict[str, int]:
    """Token -> id."""
    letters = _byte_letters()
    tokens = [
        *letters,
        *(letter + _WORD_END for letter in letters),
        *map("".join, merges()),
        BEGIN,
        END,
    ]
    return {token: i for i, token in enumerate(tokens)}


def hf_tokenizer() -> CLIPTokenizer:
    """The vocabulary as a Hugging Face tokenizer; it pads with the end token, as CLIP-L's does."""
    return CLIPTokenizer(
        vocab=vocabulary(),
        merges=merges(),  # type: ignore[arg-type]
        model_max_length=CONTEXT,
    )


def write_open_clip_merges(path: Path) -> None:
    """The vocabulary as open_clip.SimpleTokenizer(bpe_path=...) reads it; bytes never vary."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
