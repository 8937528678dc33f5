"""`lm import`: whatever is given is recognised by its contents, and made a checkpoint."""

from collections.abc import Callable
from pathlib import Path

from lm import outputs, storage
from lm.checkpoints import checkpoint, gguf, huggingface, nanogpt, owned, safetensors
from lm.checkpoints.foreign import Foreign
from lm.checkpoints.schema import Saved
from lm.corpus import sources
from lm.errors import UserError, described, setting
from lm.tokenizers import make

EXPECTED = "say a folder of lm export, one of Hugging Face's with config.json, a GGUF file, or nanoGPT's ckpt.pt"


def import_any(
    source: Path,
    output: Path,
    *,
    tokenizer: str | None = None,
    corpus: str | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint from what lm or another program exported: for inference and fine-tuning, not for resuming.

    Args:
        source: A folder of `lm export`, a folder of Hugging Face's transformers, a GGUF file, or nanoGPT's ckpt.pt.
        output: A new file.
        tokenizer: Its name, see `lm.tokenizers.make`, where the source has none, or lm no equal of its own.
        corpus: The text whose characters are the symbols of the tokenizer `char`.
        overwrite: Whether it may replace a checkpoint of lm's.
        note: Called with a line about what is worth knowing.

    Raises:
        UserError: The source is damaged or something else, lm has no equal of it, or the output is not free or cannot
            be written.
    """
    if (source / safetensors.REST).exists() or not source.exists():
        return safetensors.import_safetensors(source, output, overwrite=overwrite, note=note)
    outputs.check_free(output, made="checkpoint", ours=owned.is_ours, overwrite=overwrite)
    if source.is_file() and not checkpoint.damage(source):
        raise UserError(f"{setting('source')} {source}: it is a checkpoint of lm's already: use it as it is")
    saved = read(source, tokenizer=tokenizer, corpus=corpus, note=note)
    safetensors.note_not_finite(source, saved.weights, note)
    safetensors.write_file(saved.imported(), output)
    return output


def load(path: Path, named: str) -> Saved:
    """Return what a checkpoint, or a folder of Hugging Face's transformers, holds.

    Args:
        path: The checkpoint or the folder.
        named: The setting that it is the value of.

    Raises:
        UserError: It is damaged or something else.
    """
    if (path / huggingface.CONFIG).is_file():
        return read(path, named=named, note=lambda text: None)
    return Saved.of(checkpoint.load(path))


def peek(path: Path, named: str) -> Saved:
    """Return the same; a checkpoint's tensors stay on the disk."""
    if (path / huggingface.CONFIG).is_file():
        return load(path, named)
    return checkpoint.peek(checkpoint.verify(path))


def read(
    source: Path,
    *,
    named: str = "source",
    tokenizer: str | None = None,
    corpus: str | None = None,
    note: Callable[[str], None],
) -> Saved:
    """Return the checkpoint that another program's folder or file becomes; see `import_any`.

    Args:
        source: The folder or file.
        named: The setting that it is the value of.
        tokenizer: See there.
        corpus: See there.
        note: See there.

    Raises:
        UserError: It is damaged or something else, or lm has no equal of it.
    """
    try:
        if source.is_dir():
            found, usual = huggingface.read_huggingface(source, tokenizer is None), None
        elif _is_gguf(source):
            found, usual = gguf.read_gguf(source, tokenizer is None), None
        else:
            found, usual = nanogpt.read_nanogpt(source)
        if name := tokenizer or (None if found.tokenizer else usual):
            found = _with_tokenizer(found, name, corpus)
        if found.tokenizer is None:
            raise ValueError(
                f"it has no tokenizer: name the one that it was trained with by {setting('tokenizer')} of lm import "
                f"(with char, its text by {setting('corpus')})"
            )
        saved = found.saved(source.absolute().stem)
    except OSError as error:
        raise UserError(f"{setting(named)} {source}: {str(error)[:300]}: {EXPECTED}") from error
    except checkpoint.FOREIGN as error:
        what = str(error) if type(error) is ValueError else f"it is damaged ({described(error)})"
        raise UserError(f"{setting(named)} {source}: {' '.join(what.split())}") from error
    if saved.vocab_size != found.tokenizer.n_vocab:
        ids = f"{found.tokenizer.n_vocab:,}"
        note(f"{source}: its embedding has {saved.vocab_size:,} rows for {ids} ids: the last ones are no token's")
    return saved


def _is_gguf(source: Path) -> bool:
    with storage.plain(source).open("rb") as file:
        return file.read(len(gguf.MAGIC)) == gguf.MAGIC


def _with_tokenizer(found: Foreign, name: str, corpus: str | None) -> Foreign:
    def symbols() -> set[str]:
        return set(sources.find(corpus or "shakespeare").read())

    return found.with_tokenizer(make(name, symbols))
