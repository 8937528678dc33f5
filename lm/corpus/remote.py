"""Prepared corpora on S3, GCS, HTTP or any other storage that fsspec knows: each shard is copied when it is first read.

fsspec reaches every storage through one interface and comes with Lightning; LitData would bring a format and a client
of its own. But fsspec's caches take a partial copy, left by a killed process, for a complete one, and let two processes
overwrite each other's. So lm copies itself: to a temporary name, checked against the manifest's SHA-256, then renamed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm import storage
from lm.corpus import verification
from lm.corpus.shard_header import Header
from lm.errors import UserError


def is_remote(corpus: str) -> bool:
    """Return whether a corpus is given by URL."""
    return "://" in corpus


@dataclass(frozen=True)
class Remote:
    """A folder at a URL, and its local copy.

    Args:
        url: Where it is.
        folder: The local copy, named by a hash of the manifest: a corpus that is prepared again gets a new one.
    """

    url: str
    folder: Path

    @classmethod
    def open(cls, url: str) -> "Remote":
        """Copy the manifest and the tokenizer.

        Raises:
            UserError: There is no prepared corpus at the URL, or no access.
        """
        manifest = _read(url, "manifest.json")
        folder = storage.tokens_home() / "remote" / hashlib.sha256(manifest).hexdigest()[:32]
        if not (folder / "manifest.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_whole(folder / "tokenizer.json", _read(url, "tokenizer.json"))
            storage.write_whole(folder / "manifest.json", manifest)
        return cls(url, folder)

    def fetch(self, path: Path, header: Header) -> None:
        """Copy a shard if there is no copy yet.

        Args:
            path: Where to; the file name is the shard's.
            header: Its header according to the manifest.

        Raises:
            UserError: It cannot be downloaded, or is not the shard in the manifest.
        """
        if path.exists():
            return
        part = storage.part_of(path)
        try:
            system, root = _system(self.url)
            system.get_file(f"{root}/{path.name}", str(part))
            verification.check(part, header)
            part.replace(path)
            verification.remember(path, header)
        except OSError as error:
            raise UserError(f"shard {self.url}/{path.name}: could not be copied ({error})") from error
        except UserError as error:
            problem = str(error).removeprefix(f"shard {part}: ").split(": ")[0]
            raise UserError(f"shard {self.url}/{path.name}: {problem}: upload it again") from error
        finally:
            part.unlink(missing_ok=True)


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:  # a package for the protocol is missing, or there is no such protocol
        raise UserError(f"corpus {url}: {error}") from error
    return found


def _read(url: str, name: str) -> bytes:
    system, root = _system(url)
    try:
        data: bytes = system.cat_file(f"{root}/{name}")
    except OSError as error:
        raise UserError(f"corpus {url}: no prepared corpus is there to be read ({error or name})") from error
    return data
