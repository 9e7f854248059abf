"""A byte-pair tokenizer that splits ESC-50's labels as a Qwen tokenizer does: 31 of the 50 take several tokens."""

from __future__ import annotations

from typing import Any

from tiny import tiny_hf_model, tiny_processor, token_ids

_ONE = (
    "dog pig cow frog cat hen insects sheep rain wind breathing coughing laughing helicopter engine train airplane "
    "fireworks footsteps"
)
_SEVERAL_WORDS = (
    "sea waves, crackling fire, chirping birds, water drops, pouring water, toilet flush, crying baby, brushing teeth, "
    "drinking sipping, door wood knock, mouse click, keyboard typing, door wood creaks, can opening, washing machine, "
    "vacuum cleaner, clock alarm, clock tick, glass breaking, car horn, church bells, hand saw"
)
_RARE = "rooster crow crickets thunderstorm sneezing clapping snoring chainsaw siren"
_PIECES = "roo cr thunder sneez cl sn chain sir"
ONE = tuple(_ONE.split())
"""Labels of one token."""
SEVERAL_WORDS, PIECES = tuple(_SEVERAL_WORDS.split(", ")), tuple(_PIECES.split())
LABELS = (*ONE, *SEVERAL_WORDS, *_RARE.split())


def trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Train on sentences with all words but the rare ones: the tokens that are new, and the merges that make them."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = [word for label in (*ONE, *SEVERAL_WORDS) for word in label.split()]
    text = [*(f"a {word} is heard" for word in words), *(f" {piece}" for piece in PIECES)] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*text, "storms eaten tickets"], trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return ["".join(merge) for merge in merges], merges


def pieces_model() -> Any:
    """A random thinker whose processor has this tokenizer: bytes and specials as always, the new tokens after them."""
    from tokenizers.models import BPE

    import av_lens as avl

    made, merges = trained()
    processor, ids = tiny_processor(), token_ids()
    vocab = ids | {token: len(ids) + number for number, token in enumerate(dict.fromkeys(made))}
    processor.tokenizer.backend_tokenizer.model = BPE(vocab=vocab, merges=merges)
    return avl.load("pieces", hf_model=tiny_hf_model(vocab_size=len(vocab)), processor=processor)
