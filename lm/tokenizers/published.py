"""The published byte-pair encodings: where their merge tables come from, and the pattern that cuts text into words.

tiktoken itself downloads without a timeout, so lm never lets it: merge tables come from tiktoken's cache if their hash
is right, from the data folder, or from a download with a timeout and a pinned hash. A machine without a network needs
one file, NAME.tiktoken, in $LM_DATA_HOME.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lm import storage
from lm.errors import UserError
from lm.tokenizers.merges import to_text
from lm.tokenizers.tokenizer import END_OF_TEXT

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


class Encoding(NamedTuple):
    """A published encoding."""

    name: str
    url: str
    """Where its merge table is downloaded from."""
    sha256: str
    """Of the merge table's file."""
    pattern: str
    """The regular expression that cuts text into words."""
    special: dict[str, int] | None = None
    """Ids of its special tokens; None for the end-of-text token alone, after the last merge."""

    def ranks(self) -> str:
        """Return its merge table, the text of a .tiktoken file.

        Raises:
            UserError: It is not here and cannot be downloaded; the message names the missing file.
        """
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        cache = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
        cached = cache / hashlib.sha1(self.url.encode()).hexdigest()
        if cached.is_file() and storage.sha256(cached) == self.sha256:
            return cached.read_text()
        if self.name == "gpt2" and (ranks := _gpt2_from_pair(cache)):
            return ranks
        return storage.fetch(f"{self.name}.tiktoken", self.url, self.sha256).read_text()


HOST = "https://openaipublic.blob.core.windows.net/encodings"
PUBLISHED = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "gpt2",
            f"{HOST}/r50k_base.tiktoken",
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            GPT2_PATTERN,
        ),
        Encoding(
            "cl100k_base",
            f"{HOST}/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            CL100K_PATTERN,
            {
                END_OF_TEXT: 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
        ),
        Encoding(
            "o200k_base",
            f"{HOST}/o200k_base.tiktoken",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
            O200K_PATTERN,
            {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        ),
    )
}


def _gpt2_from_pair(cache: Path) -> str | None:
    """Return the merge table from the vocab.bpe and encoder.json that tiktoken's own `gpt2` leaves in its cache."""
    pair = {
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    if not all((cache / name).is_file() and storage.sha256(cache / name) == digest for name, digest in pair.items()):
        return None
    from tiktoken_ext.openai_public import gpt2

    return to_text(gpt2()["mergeable_ranks"])


def main() -> None:
    """Put GPT-2's merge table into tiktoken's cache, $TIKTOKEN_CACHE_DIR, while an image is built."""
    encoding, folder = PUBLISHED["gpt2"], Path(os.environ["TIKTOKEN_CACHE_DIR"])
    with tempfile.TemporaryDirectory() as home:
        os.environ["LM_DATA_HOME"] = home
        try:
            text = encoding.ranks()
        except UserError as error:
            print(f"note: the image is without gpt2: {error}", file=sys.stderr)
            return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha1(encoding.url.encode()).hexdigest()).write_text(text)
