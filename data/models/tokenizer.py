"""Whether a tokenizer has its words, judged by its files; nothing here imports torch.

transformers builds a tokenizer from whatever is there: without a vocabulary every prompt becomes
the same tokens, and without some of its merges words fall into letters.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.artifacts.readable import UnreadableError, check_readable, read_json_object
from data.models.safetensors_header import some

WHOLE = "tokenizer.json"
CLIP_FILES = ("vocab.json", "merges.txt")
"""What CLIP's and Qwen's tokenizers have where they have no tokenizer.json."""
BERT_FILES = ("vocab.txt",)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OTHER_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""Vocabularies of the tokenizers of other text encoders."""
WORD_END = "</w>"
"""How the last letters of a word end in CLIP's vocabulary."""


def check_vocabulary(folder: Path, what: str, plain: tuple[str, ...] = CLIP_FILES) -> None:
    """Refuse a tokenizer whose vocabulary is missing, damaged or incomplete.

    `plain` are the files that serve without a tokenizer.json.

    Raises:
        UnreadableError: Begins with `what` and names the file.
    """
    for name in SETTINGS:
        if (folder / name).exists():
            read_json_object(folder / name, what)
    if (folder / WHOLE).exists():
        _check_bpe(folder / WHOLE, read_json_object(folder / WHOLE, what).get("model"), what)
        return
    if not all((folder / name).exists() for name in plain):
        raise UnreadableError(
            f"{what}: {folder} has no tokenizer; it needs {WHOLE}, or {' and '.join(plain)}"
        )
    for name in plain:
        check_readable(folder / name, what)
    if plain == CLIP_FILES:
        vocab = read_json_object(folder / CLIP_FILES[0], what)
        merges = _lines(folder / CLIP_FILES[1], what)
        _check_bpe(folder / CLIP_FILES[1], {"vocab": vocab, "merges": merges}, what)
    elif plain == BERT_FILES:
        _lines(folder / BERT_FILES[0], what)


def vocabulary_files(folder: Path) -> tuple[str, ...]:
    """Which files of a vocabulary a tokenizer's folder needs, if it has no tokenizer.json."""
    for files in (BERT_FILES, *((name,) for name in OTHER_FILES)):
        if (folder / files[0]).exists():
            return files
    return CLIP_FILES


def check_settings(folder: Path, what: str) -> None:
    """Refuse a tokenizer without the settings that say how a prompt is padded and cut.

    Raises:
        UnreadableError: tokenizer_config.json is missing, or its model_max_length is no length.
    """
    path = folder / "tokenizer_config.json"
    length = read_json_object(path, what).get("model_max_length")
    if length is not None and (not isinstance(length, int | float) or length < 3):
        raise UnreadableError(
            f"{what}: {path} has model_max_length={length!r}; needed is a number of tokens, such "
            "as 77, of which begin and end take two"
        )


def check_size(tokenizer: Any, config: Any, where: Path, what: str, *, ends: bool = True) -> None:
    """Refuse a loaded tokenizer that is another than its text encoder was trained with.

    `ends`: whether the text encoder waits for a token that ends a prompt.

    Raises:
        UnreadableError: It has more words than the text encoder, or ends a prompt otherwise.
    """
    words, known = len(tokenizer), int(config.vocab_size)
    if words > known:
        raise UnreadableError(
            f"{what}: {where} has {words} words, but its text encoder knows {known}; give the "
            "tokenizer that the text encoder was trained with"
        )
    own, end = tokenizer.eos_token_id, config.eos_token_id
    if ends and end not in (2, own):  # 2 in CLIP's old configurations: the highest token is the end
        raise UnreadableError(
            f"{what}: {where} ends a prompt with token {own}, but its text encoder waits for "
            f"{end} (eos_token_id); give the tokenizer that the text encoder was trained with"
        )


def load_tokenizer(kind: Any, folder: Path, what: str) -> Any:
    """A tokenizer of a class of transformers, from its folder.

    Raises:
        UnreadableError: The files are of another class, or contradict each other.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers' own errors have no common base
        raise UnreadableError(f"{what}: {folder} holds no {kind.__name__} ({error})") from error


def _check_bpe(path: Path, model: Any, what: str) -> None:
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping | list) or not vocab:
        raise UnreadableError(f"{what}: {path} has no vocabulary; fetch the tokenizer again")
    if not isinstance(vocab, Mapping) or not any(token.endswith(WORD_END) for token in vocab):
        return
    merged = set(map("".join, _pairs(model.get("merges") or [])))
    lacking = [
        token
        for token in vocab
        if len(token.removesuffix(WORD_END)) > 1 and token not in merged and not _is_mark(token)
    ]
    if lacking:
        raise UnreadableError(
            f"{what}: {path} has no merge that makes {some(lacking)} of its vocabulary; it is "
            "incomplete: fetch the tokenizer again"
        )


def _pairs(merges: Iterable[Any]) -> Iterable[list[str]]:
    return (merge.split() if isinstance(merge, str) else list(map(str, merge)) for merge in merges)


def _is_mark(token: str) -> bool:
    return token.startswith("<") and token.endswith(">")


def _lines(path: Path, what: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UnreadableError(
            f"{what}: {path} cannot be read as text ({error}); fetch the tokenizer again"
        ) from error
    return [line for line in lines if line and not line.startswith("#version")]
