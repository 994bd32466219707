"""Text as tokens: documents from files and archives, byte-pair encoding, batches."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from sparse_lightning.files import atomic_write, check_writable, write_text

SUFFIXES = (".c", ".h", ".S", ".rst", ".txt", ".md", ".py")
SEPARATOR = b"\0"  # between the documents of a text file
_SUMMARY = "summary.json"
_END = "<|endoftext|>"  # token 0, after every document
_CHUNK = 2**23  # bytes that are read or encoded at once
_MB = 10**6


def read_documents(source: Path, suffixes: Sequence[str] = SUFFIXES) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every document of a source.

    Args:
        source: a folder or a tar archive, whose text files are the documents; or a text file,
            `.txt` or `.txt.xz`, whose documents are separated by NUL bytes.
        suffixes: endings of the names of text files in folders and archives. A file with a NUL byte
            is not text, whatever its name.

    Raises:
        ValueError: for any other source.
    """
    if source.is_dir():
        named = _read_folder(source, suffixes)
    elif not source.is_file():
        raise ValueError(f"`SOURCE` must be a folder or a file that exists; got '{source}'.")
    elif source.name.endswith((".txt", ".txt.xz")):
        named = _read_text(source)
    elif tarfile.is_tarfile(source):
        named = _read_archive(source, suffixes)
    else:
        raise ValueError(
            "`SOURCE` must be a folder, a tar archive, or a .txt or .txt.xz file; got "
            f"'{source}'. Give the folder that holds the file to read it as one document."
        )
    return ((name, text) for name, text in named if text and SEPARATOR not in text)


def _read_folder(folder: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _read_archive(archive: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r|*") as members:
        for member in members:
            if member.isfile() and Path(member.name).suffix in suffixes:
                content = members.extractfile(member)
                assert content is not None, "it is a regular file"
                yield member.name, content.read()


def _read_text(path: Path) -> Iterator[tuple[str, bytes]]:
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        rest, numbers = b"", itertools.count()
        while chunk := file.read(_CHUNK):
            *documents, rest = (rest + chunk).split(SEPARATOR)
            yield from ((str(next(numbers)), document) for document in documents)
        yield str(next(numbers)), rest


def choose(documents: Iterable[tuple[bytes, bytes]], size: int) -> list[bytes]:
    """Return documents of about `size` bytes together, or all if there are fewer, sorted by key.

    Those with the smallest hashes of their keys are chosen, whatever the order of the documents.

    Args:
        documents: pairs of a key and a content.
        size: number of bytes to reach.

    >>> documents = [(b"a", b"1" * 40), (b"b", b"2" * 40), (b"c", b"3" * 40)]
    >>> choose(documents, 80) == choose(documents[::-1], 80), len(choose(documents, 80))
    (True, 2)
    """
    chosen: list[tuple[int, bytes, bytes]] = []  # a heap, with the largest hash first
    total = 0
    for key, content in documents:
        order = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        heapq.heappush(chosen, (-order, key, content))
        total += len(content)
        while total - len(chosen[0][2]) >= size:
            total -= len(heapq.heappop(chosen)[2])
    return [content for _, content in sorted((key, content) for _, key, content in chosen)]


def write_corpus(source: Path, file: Path, megabytes: float, largest: float) -> tuple[int, int]:
    """Write a part of a source into one compressed text file; return its documents and bytes.

    The documents are chosen by a hash of their names, and sorted by name, because neighbours are
    alike and compress better.

    Args:
        source: as `read_documents` takes it.
        file: a `.txt.xz` file.
        megabytes: size of the text, in units of 10^6 bytes.
        largest: size of the largest document, in units of 10^3 bytes; longer ones, which are often
            generated tables, are left out.
    """
    if not file.name.endswith(".txt.xz"):
        raise ValueError(f"`FILE` must end in .txt.xz; got '{file}'.")
    check_writable(file, "FILE")
    documents = choose(
        (
            (name.encode(), content)
            for name, content in read_documents(source)
            if len(content) <= 1000 * largest
        ),
        round(megabytes * _MB),
    )
    if not documents:
        raise ValueError(_nothing_to_read(source))
    with atomic_write(file) as path, lzma.open(path, "wb", preset=6) as out:
        out.write(SEPARATOR.join(documents))
    return len(documents), sum(map(len, documents))


def _nothing_to_read(source: Path) -> str:
    return (
        "`SOURCE` must have documents, of which some are held out; got too few in "
        f"'{source}'. Files in folders and archives must end in {', '.join(SUFFIXES)}."
    )


# -- tokens -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a folder of tokens holds.

    Attributes:
        source: name of the source.
        vocabulary: number of different tokens.
        held_out: share of the documents that is held out.
        train_tokens, held_out_tokens: numbers of tokens.
        held_out_bytes: size of the held-out text, without the ends of documents.
        digest: hash of all tokens, by which results on different data are told apart.
    """

    source: str
    vocabulary: int
    held_out: float
    train_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    digest: str


def prepare(
    source: Path, folder: Path, vocabulary: int, held_out: float, sample_megabytes: float
) -> Summary:
    """Encode a source into a folder of tokens, unless it has been done; return what it holds.

    The folder gets `tokenizer.json`, the tokens `train.bin` and `held_out.bin` as uint16, and
    `summary.json`. Equal documents are on the same side, because a hash of the content decides
    which are held out.

    Args:
        source: as `read_documents` takes it.
        folder: folder to create.
        vocabulary: number of different tokens.
        held_out: share of the documents to hold out.
        sample_megabytes: text that the encoding is learned from, in units of 10^6 bytes.
    """
    # The 256 bytes and the end of a document are tokens in every vocabulary.
    if not 257 <= vocabulary <= 2**16:
        raise ValueError(f"`--vocabulary` must be from 257 to 65536; got {vocabulary}.")
    if not 0 < held_out < 1:
        raise ValueError(f"`--held-out` must be a share in (0, 1); got {held_out}.")
    if (folder / _SUMMARY).exists():
        found = read_summary(folder)
        if (found.source, found.vocabulary, found.held_out) != (source.name, vocabulary, held_out):
            raise ValueError(
                f"`FOLDER` must be new, or hold tokens of the same source; got '{folder}', "
                f"which was made with {found}. Give another folder."
            )
        return found
    check_writable(folder, "FOLDER", kind="folder")
    folder.mkdir(exist_ok=True)
    return _encode_all(source, folder, vocabulary, held_out, sample_megabytes)


def read_summary(folder: Path) -> Summary:
    """Return what a folder of tokens holds.

    Raises:
        ValueError: if `prepare` did not write it.
    """
    try:
        return Summary(**json.loads((folder / _SUMMARY).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"`DATA` must be a folder that `prepare` has written; got '{folder}'. Run "
            "python benchmarks/lm prepare SOURCE FOLDER."
        ) from error


def _encode_all(
    source: Path, folder: Path, vocabulary: int, held_out: float, sample_megabytes: float
) -> Summary:
    def is_held_out(content: bytes) -> bool:
        return zlib.crc32(content) < held_out * 2**32

    sample = choose(
        ((content, content) for _, content in read_documents(source) if not is_held_out(content)),
        round(sample_megabytes * _MB),
    )
    tokenizer = learn_encoding(sample, vocabulary)
    if tokenizer.get_vocab_size() < vocabulary:
        raise ValueError(
            f"`--vocabulary` must not exceed the {tokenizer.get_vocab_size()} tokens that the "
            f"sample of the text has; got {vocabulary}. Give fewer, or more text."
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    digest = hashlib.blake2b(digest_size=8)
    tokens, size = [0, 0], [0, 0]
    with (folder / "train.bin").open("wb") as train, (folder / "held_out.bin").open("wb") as held:
        files: tuple[BinaryIO, BinaryIO] = (train, held)
        for chunk in _chunks(content for _, content in read_documents(source)):
            for content, ids in zip(chunk, encode(tokenizer, chunk), strict=True):
                side = is_held_out(content)
                files[side].write(ids.tobytes())
                digest.update(ids.tobytes())
                tokens[side] += len(ids)
                size[side] += len(content)
    if not all(tokens):
        raise ValueError(_nothing_to_read(source))
    summary = Summary(source.name, vocabulary, held_out, *tokens, size[True], digest.hexdigest())
    # The last file, since the folder is complete with it.
    write_text(folder / _SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _chunks(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield lists of documents of `_CHUNK` bytes together."""
    chunk: list[bytes] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def learn_encoding(sample: Sequence[bytes], vocabulary: int) -> Tokenizer:
    """Return a byte-pair encoding that is learned from documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode(errors="replace") for text in sample), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[bytes]) -> list[np.ndarray]:
    """Return the tokens of each document as uint16, with the end of the document."""
    texts = [document.decode(errors="replace") for document in documents]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    end = tokenizer.token_to_id(_END)
    return [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings]


# -- batches ------------------------------------------------------------------------------------


class Batches:
    """The batches of a training, each a function of the seed and the step only.

    An epoch covers the tokens by windows that follow each other, in a random order. So a training
    that is resumed at any step continues with the batches of one that was never interrupted.

    Args:
        file: file of uint16 tokens, which is mapped into memory.
        context: number of tokens of a window, besides the last target.
        batch: number of windows in a batch.
        seed: seed of the order.
    """

    def __init__(self, file: Path, context: int, batch: int, seed: int) -> None:
        self.tokens = np.memmap(file, np.uint16, "r")
        self.context, self.batch, self.seed = context, batch, seed
        self.windows = (len(self.tokens) - 1) // context
        if self.windows < batch:
            raise ValueError(
                f"`--batch` must not exceed the {self.windows} windows of {context} tokens in "
                f"'{file}'; got {batch}. Give a smaller batch or context, or prepare more text."
            )
        self._epoch = -1
        self._order = torch.empty(0)

    def __getitem__(self, step: int) -> Tensor:
        """Return the windows of a step, int64 `[batch, context + 1]`."""
        epoch, index = divmod(step, self.windows // self.batch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        return self.cut(self._order[index * self.batch :][: self.batch].tolist())

    def evenly(self, n: int) -> Iterator[Tensor]:
        """Yield batches of about `n` windows together, evenly spaced; at least one batch."""
        n = max(self.batch, min(n, self.windows) // self.batch * self.batch)
        for windows in torch.linspace(0, self.windows - 1, n).long().split(self.batch):
            yield self.cut(windows.tolist())

    def cut(self, windows: Sequence[int]) -> Tensor:
        """Return windows by number, int64 `[n, context + 1]`."""
        starts = (window * self.context for window in windows)
        rows = [self.tokens[start : start + self.context + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
