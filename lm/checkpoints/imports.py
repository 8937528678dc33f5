"""`lm import`: whatever is given is recognised by its contents, and made a checkpoint."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lm import outputs
from lm.checkpoints import checkpoint, huggingface, nanogpt, owned, safetensors
from lm.checkpoints.foreign import Foreign
from lm.corpus import sources
from lm.errors import UserError, described, setting
from lm.tokenizers import make


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
        source: A folder of `lm export`, a folder of Hugging Face's transformers, or nanoGPT's ckpt.pt.
        output: A new file.
        tokenizer: Its name, see `lm.tokenizers.make`, where the source has none.
        corpus: The text whose characters are the symbols of the tokenizer `char`.
        overwrite: Whether it may replace a checkpoint of lm's.
        note: Called with a line about what is worth knowing.

    Raises:
        UserError: The source is damaged or something else, lm has no equal of it, or the output is not free or cannot
            be written.
    """
    if (source.is_dir() and (source / safetensors.REST).exists()) or not source.exists():
        return safetensors.import_safetensors(source, output, overwrite=overwrite, note=note)
    outputs.check_free(output, made="checkpoint", ours=owned.is_ours, overwrite=overwrite)
    if source.is_file() and not checkpoint.damage(source):
        raise UserError(f"{setting('source')} {source}: it is a checkpoint of lm's already: use it as it is")
    try:
        found, name = (huggingface.read_huggingface(source), None) if source.is_dir() else nanogpt.read_nanogpt(source)
        name = tokenizer or name
        if found.tokenizer is None and name is None:
            raise ValueError(
                f"it has no tokenizer: name the one that it was trained with by {setting('tokenizer')} (with char, its "
                f"text by {setting('corpus')})"
            )
        if tokenizer or (found.tokenizer is None and name):
            found = _with_tokenizer(found, str(name), corpus)
        saved = found.saved(source.absolute().stem)
    except OSError as error:
        raise UserError(f"{setting('source')} {source}: {error}: {EXPECTED}") from error
    except (*checkpoint.FOREIGN, SafetensorError) as error:
        what = str(error) if type(error) is ValueError else described(error, 300)
        raise UserError(f"{setting('source')} {source}: {' '.join(what.split())}") from error
    assert found.tokenizer is not None
    if saved.tokenizer != found.tokenizer.state():
        ids = f"{found.tokenizer.n_vocab:,}"
        note(f"{source}: its embedding has {saved.vocab_size:,} rows for {ids} ids: the last ones are no token's")
    safetensors.note_not_finite(source, saved.weights, note)
    safetensors.write_file(saved.imported(), output)
    return output


EXPECTED = "say a folder of lm export, one of Hugging Face's with config.json, or nanoGPT's ckpt.pt"


def _with_tokenizer(found: Foreign, name: str, corpus: str | None) -> Foreign:
    def symbols() -> set[str]:
        return set(sources.find(corpus or "shakespeare").read())

    return found.with_tokenizer(make(name, symbols))
