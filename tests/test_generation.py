"""Decoding against transformers' generate: the same weights and settings give the same tokens."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from pytransformer import nn
from pytransformer.generation import Cache, generate, positions_of
from pytransformer.generation.cache import Ancestry, GrowingKeyValue
from pytransformer.models import Gpt, GptConfig

transformers = pytest.importorskip("transformers")

EOS, PAD = (2, 13), 5


def same_tokens(found, wanted, eos=EOS):
    """Equal up to and including each row's first end; behind it both pad, with tokens of their own."""
    assert found.shape[0] == wanted.shape[0]
    assert found.shape[1] == wanted.shape[1]
    for ours, theirs in zip(found.tolist(), wanted.tolist(), strict=True):
        ends = [i for i, t in enumerate(theirs) if t in eos and i > 0]
        end = ends[0] + 1 if ends else len(theirs)
        assert ours[:end] == theirs[:end]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A random GPT-2 whose distributions are peaked enough to have no ties, and end now and then."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("gpt")
    theirs.save_pretrained(path)
    return theirs, Gpt.from_pretrained(path)


def prompts(kind):
    ids = torch.randint(8, 30, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if kind == "ragged":
        mask[1, :4] = mask[2, :8] = mask[3, :1] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def both(gpt, ids, mask, eos=EOS, **settings):
    theirs, ours = gpt
    wanted = theirs.generate(
        ids, attention_mask=mask, eos_token_id=None if eos is None else list(eos), pad_token_id=PAD, **settings
    )
    torch.manual_seed(0)
    found = generate(ours, ids, mask, eos_token_id=eos, pad_token_id=PAD, **settings)
    return found, wanted


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("eos", [EOS, None])
def test_greedy(gpt, kind, eos):
    found, wanted = both(gpt, *prompts(kind), eos, max_new_tokens=24)
    if eos is not None:
        assert (wanted == PAD).any()  # some rows ended, some went on
    assert torch.equal(found.sequences, wanted)
    assert found.scores is None


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.0])
def test_beam(gpt, kind, early_stopping, length_penalty):
    settings = {
        "max_new_tokens": 16,
        "num_beams": 4,
        "num_return_sequences": 3,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
    }
    found, wanted = both(gpt, *prompts(kind), **settings)
    same_tokens(found.sequences, wanted)
    theirs, ours = gpt
    ids, mask = prompts(kind)
    output = theirs.generate(
        ids,
        attention_mask=mask,
        eos_token_id=list(EOS),
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    torch.testing.assert_close(found.scores, output.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_beams", [2, 7])
@pytest.mark.parametrize("eos", [None, (3,)])
def test_other_beams(gpt, num_beams, eos):
    found, wanted = both(gpt, *prompts("ragged"), eos, max_new_tokens=20, num_beams=num_beams)
    same_tokens(found.sequences, wanted, eos or ())


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 9, "top_p": 0.8}]
)
def test_sampling_draws_what_transformers_draws(gpt, shape):
    theirs, ours = gpt
    ids, mask = prompts("ragged")
    settings = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2, "pad_token_id": PAD, **shape}
    torch.manual_seed(7)
    wanted = theirs.generate(ids, attention_mask=mask, eos_token_id=list(EOS), **{"top_k": 0, **settings})
    torch.manual_seed(7)
    found = generate(ours, ids, mask, eos_token_id=EOS, **settings)
    assert torch.equal(found.sequences, wanted)
    repeated = [generate(ours, ids, mask, eos_token_id=EOS, seed=3, **settings).sequences for _ in range(2)]
    assert torch.equal(*repeated)


def test_tokens_are_suppressed_and_forced(gpt):
    ids, mask = prompts("even")
    settings = {"suppress_tokens": [9, 11, 12, 20], "forced_eos_token_id": 13, "max_new_tokens": 10}
    for num_beams in (1, 3):
        found, wanted = both(gpt, ids, mask, num_beams=num_beams, **settings)
        same_tokens(found.sequences, wanted)


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("goes_on", [9, 20])
def test_nothing_goes_on_behind_an_end_where_fewer_tokens_than_beams_may_come(gpt, num_beams, goes_on):
    suppressed = [t for t in range(30) if t not in (*EOS, goes_on)]
    found, wanted = both(gpt, *prompts("even"), num_beams=num_beams, suppress_tokens=suppressed, max_new_tokens=8)
    same_tokens(found.sequences, wanted)


def test_a_prompt_may_use_the_whole_table(gpt):
    ids = torch.full((1, 60), 9)
    assert generate(gpt[1], ids, max_new_tokens=5, eos_token_id=None).sequences.shape == (1, 65)
    with pytest.raises(ValueError, match=r"60 prompt tokens and max_new_tokens = 6 need 65 positions.*has 64"):
        generate(gpt[1], ids, max_new_tokens=6)


def test_a_step_equals_the_whole(gpt):
    """Prompt in two pieces, then single steps, among padding: the logits of one pass over all."""
    _, ours = gpt
    ids, mask = prompts("ragged")
    positions = positions_of(mask)
    with torch.no_grad():
        whole = ours(ids, mask, positions).logits
        cache = Cache()
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
            piece = ours(ids[:, start:end], mask[:, :end], positions[:, start:end], cache=cache).logits
            real = mask[:, start:end, None]
            torch.testing.assert_close(piece * real, whole[:, start:end] * real, rtol=1e-4, atol=1e-4)
    assert cache.length == 9


def test_a_torch_decoder_decodes_with_the_cache():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    tgt, memory = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    cache = Cache()
    with torch.no_grad():
        mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
        wanted = decoder(tgt, memory, tgt_mask=mask)
        steps = [decoder(tgt[:, t : t + 1], memory, cache=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-4, atol=1e-5)


def test_the_cache_grows_without_copying_each_step():
    held = GrowingKeyValue()
    keys = torch.randn(2, 3, 100, 4)
    moves, pointer = 0, None
    for t in range(100):
        found, values = held.append(keys[:, :, t : t + 1], -keys[:, :, t : t + 1, :2])
        moves += found.data_ptr() != pointer
        pointer = found.data_ptr()
        assert torch.equal(found, keys[:, :, : t + 1])
        assert torch.equal(values, -keys[:, :, : t + 1, :2])
    assert moves == 3  # room for 32, 64, 128
    with pytest.raises(
        ValueError, match=r"cache: key must be \[B,H,T,D\] = \[2, 3, T, 4\] as before, got \[1, 3, 1, 4\]"
    ):
        held.append(keys[:1, :, :1], keys[:1, :, :1, :2])
    with pytest.raises(TypeError, match=r"key must be torch\.float32 as before"):
        held.append(keys.double(), keys.double())
    with pytest.raises(ValueError, match="cache: keeps no gradients"):
        GrowingKeyValue().append(keys.requires_grad_(), keys)


def test_beams_reorder_by_rows_of_a_table():
    ancestry = Ancestry(torch.tensor([[False, True]]), beams=2, steps=3)
    ancestry.advance(torch.tensor([[0, 1]]))
    ancestry.advance(torch.tensor([[1, 0]]))
    mask = ancestry.advance(torch.tensor([[0, 0]]))
    #                  prompt | step 1 | step 2 | step 3
    wanted = [[0, 1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0, 0, 1]]
    assert mask.shape == (1, 1, 2, 8)
    assert mask[0, 0].int().tolist() == wanted


def test_a_cache_of_another_batch_is_refused(gpt):
    _, ours = gpt
    cache = Cache()
    with torch.no_grad():
        ours(torch.full((2, 3), 9), cache=cache)
        with pytest.raises(ValueError, match=r"cache: key must be \[B,H,T,D\] = \[2, 4, T, 8\] as before, got \[3, "):
            ours(torch.full((3, 1), 9), cache=cache)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer, got 0"),
        ({"num_beams": 2.0}, ValueError, "num_beams must be a positive integer, got 2.0"),
        ({"num_return_sequences": 2}, ValueError, "must be at most num_beams where nothing is sampled, got 2 and 1"),
        ({"temperature": 0.5}, ValueError, "temperature, top_k and top_p want do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"do_sample": True, "top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"do_sample": True, "num_beams": 2}, ValueError, "do_sample wants num_beams=1, got 2"),
        ({"early_stopping": "often"}, ValueError, "early_stopping must be True, False or 'never', got 'often'"),
        ({"eos_token_id": 30}, ValueError, r"eos_token_id must lie in \[0, vocab_size = 30\), got 30"),
        ({"beams": 2}, TypeError, "no argument is called 'beams'"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "must be left-padded, and row 0 ends in padding"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, r"attention_mask must have input_ids' shape \[1, 3\]"),
        ({"input_ids": torch.full((1, 3), 31)}, IndexError, "input_ids must lie in .* got 31"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids must be int32 or int64"),
    ],
)
def test_bad_arguments(gpt, change, error, words):
    with pytest.raises(error, match=words):
        generate(gpt[1], **{"input_ids": torch.full((1, 3), 9), "max_new_tokens": 4, **change})


def test_training_mode_is_refused():
    model = Gpt(GptConfig(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"evaluation mode.*model\.eval\(\)"):
        generate(model, torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)
