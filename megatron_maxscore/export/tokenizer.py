"""A model's tokenizer as transformers reads it, and which of Megatron's arguments read it back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
MODEL_FILE = "tokenizer.model"
# Megatron's default of --make-vocab-size-divisible-by.
_PADDING = 128
# Texts that a converted tokenizer must split as the original does.
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, then  two more, and one at the end ",
    "\tdef f(x: int) -> str:\n\t\treturn f'{x!r}'\n\n",
    "naïve café, 漢字かな交じり文, Ελληνικά, עברית, 🙂🏳️‍🌈",
    "3.14159 + 2,718,281 = 10^7; http://example.org/?a=b&c=d#e",
    "A" * 70 + "\x7f\u200b\u00a0\u2581end",
)


def write_tokenizer(
    args: Any, vocabulary: int, end: int, directory: Path
) -> tuple[str, dict[str, int]]:
    """Write a tokenizer into a directory.

    Args:
        args: Megatron's arguments.
        vocabulary: tokens.
        end: the token that ends a document, and stands before the first one.
        directory: where config.json is.

    Returns:
        What was written, in words, and the special tokens of config.json.

    Raises:
        ValueError: a converted tokenizer would split text differently, or cannot be read.
    """
    kind = args.tokenizer_type
    special = {f"{name}_token_id": end for name in ("bos", "eos", "pad")}
    if kind in SENTENCE_PIECE and not (
        getattr(args, "tokenizer_sentencepiece_legacy", False)
        and getattr(args, "special_tokens", None)
    ):
        _write_sentencepiece(Path(args.tokenizer_model), end, directory)
        return "the SentencePiece model, and the same as a fast tokenizer", special
    if kind == "HuggingFaceTokenizer":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_model)
        if len(tokenizer) != vocabulary:
            raise ValueError(
                f"{args.tokenizer_model} has {len(tokenizer)} tokens, and training's tokenizer "
                f"{vocabulary}: tokens were added; save that tokenizer, and name it with "
                "-- --tokenizer-model"
            )
        if getattr(args, "chat_template", None):
            tokenizer.chat_template = args.chat_template
        tokenizer.save_pretrained(directory)
        for name in ("bos", "pad"):
            own = getattr(tokenizer, f"{name}_token_id")
            special[f"{name}_token_id"] = end if own is None else own
        return f"that of {args.tokenizer_model}", special
    return f"none: {kind} has no form in transformers; put one into the directory", special


def _write_sentencepiece(model: Path, end: int, directory: Path) -> None:
    import sentencepiece
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    try:
        proto = import_protobuf().ModelProto()
    except Exception as error:  # protobuf raises a type of its own where versions do not fit
        raise ValueError(
            f"sentencepiece and protobuf do not fit together ({str(error).splitlines()[0]}); pip "
            "install -U protobuf"
        ) from error
    proto.ParseFromString(model.read_bytes())
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    if not is_bpe and proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise ValueError(f"{model} is neither BPE nor Unigram, which fast tokenizers know")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary: Any = {piece: i for i, (piece, _) in enumerate(pieces)} if is_bpe else pieces
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    last = original.id_to_piece(end)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=SpmConverter.build_tokenizer_from_spm_proto(
            proto, vocabulary, legacy=False
        ),
        unk_token=original.id_to_piece(original.unk_id()),
        # A document begins after the end of another, in training.
        bos_token=last,
        eos_token=last,
        pad_token=last,
        clean_up_tokenization_spaces=False,
    )
    for text in (*_SAMPLES, "".join(_SAMPLES)):
        ours, theirs = original.encode(text), fast.encode(text, add_special_tokens=False)
        if ours != theirs:
            raise ValueError(
                f"{model} cannot be converted exactly: {text[:40]!r} becomes {theirs[:8]}... "
                f"instead of {ours[:8]}..."
            )
    fast.save_pretrained(directory)
    shutil.copy(model, directory / MODEL_FILE)


def arguments_of(directory: Path, vocabulary: int) -> list[str]:
    """Return Megatron's arguments for the tokenizer in a Hugging Face directory.

    Args:
        directory: with config.json.
        vocabulary: tokens of the model.
    """
    import sentencepiece

    model = directory / MODEL_FILE
    # Others may have tokens beside those of the SentencePiece model.
    if model.is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
        if pieces == vocabulary:
            kind = SENTENCE_PIECE[0]
            return ["--tokenizer-type", kind, "--tokenizer-model", str(model.absolute())]
    # The model may have more rows than its tokenizer has tokens.
    padded = math.ceil(vocabulary / _PADDING) * _PADDING
    return [
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(directory.absolute()), "--padded-vocab-size", str(padded)),
    ]
