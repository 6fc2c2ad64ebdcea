"""Brackets in prompts: what they mean, what each step reads, and what becomes of the vectors."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from gen.embeddings import Embeddings
from pipelines import prompts
from pipelines.pixart_delta import PixArtDeltaPipeline
from pipelines.pixart_sigma import PixArtSigmaPipeline
from pipelines.prompts import HEAVIEST, MOST_VARIANTS, Words, chunks, parse, read, variants

LONG = (
    "a red cube and a blue sphere, a green cone on top of a white torus. two small balls behind a ring, pink"
)


@pytest.fixture
def pipeline(tiny_toy_folder: Path) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, torch_dtype=torch.float32)


def draw(pipeline, prompt: str, **options):
    options = {"num_inference_steps": 4, "height": 64, "width": 64, "prompt_syntax": "on"} | options
    seed = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=seed, output_type="latent", **options).images


# --- Reading


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red cube",
        "a (red) cube, [big]",
        "smile :) and frown :( and 16:9",
        "(a: b) [c: d] {e}",
        "(unclosed [and so on",
        "closed) too]",
        "a | b, c:d",
        "back\\slash and \\n",
        "[10:30] (see: that)",
        "((([[[)))]]]",
    ],
)
def test_a_text_without_the_explicit_forms_stays_as_it_is(text: str) -> None:
    assert read(text) == Words(text)


@pytest.mark.parametrize(
    ("text", "plain", "weights"),
    [
        ("a (red:1.3) cube", "a red cube", {"red": 1.3}),
        ("a (red cube: .5 )", "a red cube", {"red cube": 0.5}),
        ("((red:1.2) cube:1.5)", "red cube", {"red": 1.2 * 1.5, " cube": 1.5}),
        ("a (red (big) cube:0)", "a red (big) cube", {"red (big) cube": 0.0}),
        ("(3:4:1.5)", "3:4", {"3:4": 1.5}),
        (r"\(red:1.3\) (a\)b:2)", "(red:1.3) a)b", {"a)b": 2.0}),
        (r"\[a\|b\] \__c__", "[a|b] __c__", {}),
        ("a (red:1) cube", "a red cube", {}),
    ],
)
def test_weights_belong_to_their_characters(text: str, plain: str, weights: dict[str, float]) -> None:
    found = read(text)
    expected = [1.0] * len(plain)
    for words, weight in weights.items():
        at = plain.index(words)
        expected[at : at + len(words)] = [weight] * len(words)
    assert found.text == plain
    assert list(found.weights or [1.0] * len(plain)) == pytest.approx(expected)


def test_letters_that_grow_when_made_small_keep_their_weights() -> None:
    words = read("İ (Red:1.5)").cleaned()
    assert len("İ".lower()) == 2
    assert [letter for letter, weight in zip(words.text, words.weights, strict=True) if weight == 1.5] == [
        *"red"
    ]


def test_steps_take_turns() -> None:
    said = [read("a [red|blue|] cube", step, 4).text for step in range(4)]
    assert said == ["a red cube", "a blue cube", "a cube", "a red cube"]
    rows, turns = variants(["a [red|blue] [cube|ball|cone]", "[a|b]"], 12)
    assert len(rows) == 6 and turns == [0, 1, 2, 3, 4, 5] * 2
    assert rows[3] == (Words("a blue cube"), Words("b"))


def test_words_change_on_the_way() -> None:
    said = [read("[red:blue:0.5] cube", step, 4).text for step in range(4)]
    assert said == ["red cube", "red cube", "blue cube", "blue cube"]
    assert [read("[:big:0.25] cube", step, 4).text.strip() for step in range(2)] == ["cube", "big cube"]
    assert read("[red:blue:0]", 0, 4).text == "blue"
    rows, turns = variants(["[a:(b:1.5):0.5]"], 5)
    assert [row[0].text for row in rows] == ["a", "b"] and turns == [0, 0, 1, 1, 1]


def test_without_syntax_brackets_are_text() -> None:
    assert variants(["a (red:1.3) [a|b]"], 7, "off") == ([(Words("a (red:1.3) [a|b]"),)], [0] * 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a (red:2.5) cube", "(red:2.5) at character 3 is 2.5, which is not from 0 to 2"),
        ("(red:-1)", "is -1"),
        ("(red:1" + "0" * 30 + ")", "not from 0 to 2"),
        ("((red:1.5):1.5)", "multiply to 2.25"),
        ("(:1.3)", "holds no words"),
        ("a (red:1.3 cube", "( at character 3 is never closed"),
        ("a red:1.3) cube", ") at character 10 ends nothing"),
        ("a [red|blue cube", "[ at character 3 is never closed"),
        ("red|blue] cube", "] at character 9 ends nothing"),
        ("[a (b|c] d", "( at character 4 is not closed before the ]"),
        ("[|]", "nothing to take turns"),
        ("[a:b:3]", "not from 0 to 1"),
        ("(" * 30 + "a" + ":1)" * 30, "deep"),
    ],
)
def test_what_is_half_written_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        variants([text], 4)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_too_many_texts_and_weights_are_refused() -> None:
    many = " ".join("[" + "|".join("abcdefg"[:n]) + "]" for n in (2, 3, 5))
    assert len(variants([many], MOST_VARIANTS)[0]) == MOST_VARIANTS
    with pytest.raises(ValueError, match="more than 16 different texts"):
        variants([many], 20)
    with pytest.raises(ValueError, match="different weights"):
        read(" ".join(f"(a:{n / 10})" for n in range(10)))


@pytest.mark.parametrize("signs", ["(", ")", "[", "]", "()", "([", "[(", "(a", "[a|", "a:1)", "(a:1)", "\\("])
def test_reading_takes_steps_in_proportion(signs: str) -> None:
    """Of hostile texts too: twice as long, about twice as many lines of ours are run."""

    def steps(length: int) -> int:
        count = 0

        def trace(*_):
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)
        try:
            with contextlib.suppress(ValueError):
                read(signs * (length // len(signs)))
        finally:
            sys.settrace(None)
        return count

    assert steps(2400) < 3 * steps(1200)


# --- Tokens


def test_tokens_take_the_weight_of_their_words(pipeline) -> None:
    words = read("a (red:1.5) cube (and a blue:0.5) ball").cleaned()
    ids = pipeline.tokenizer(words.text).input_ids
    weights = prompts.token_weights(pipeline.tokenizer, words, len(ids))
    said = {
        weight: pipeline.tokenizer.decode(
            [one for one, its in zip(ids, weights, strict=True) if its == weight]
        )
        for weight in (1.5, 0.5)
    }
    assert {weight: text.strip() for weight, text in said.items()} == {1.5: "red", 0.5: "and a blue"}
    assert weights[-1] == 1
    assert prompts.token_weights(pipeline.tokenizer, words, 3) == [1.0, 1.5, 1.0]


def test_the_libraries_tokenizer_tells_the_same(tiny_toy_folder: Path, pipeline) -> None:
    theirs = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, own_parts=False).tokenizer
    text = "a red cube and a blue sphere"
    assert prompts.spans(theirs, text) == prompts.spans(pipeline.tokenizer, text)


def test_a_tokenizer_that_cannot_tell_is_refused(pipeline) -> None:
    class Slow:
        def __call__(self, text, return_offsets_mapping=False, verbose=True):
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers.")

    pipeline.tokenizer = Slow()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        pipeline.check("a (red:1.3) cube", prompt_syntax="on")
    pipeline.check("a red cube", prompt_syntax="on")


# --- Vectors


def test_a_weight_of_one_is_nothing_to_the_bit(pipeline) -> None:
    plain = pipeline.encode(["a red cube"])
    for text in ("a (red:1) cube", "a red cube", "((a:2) red:0.5) cube"):
        words = read(text)
        assert not words.weights or text.startswith("((")
        if not words.weights:
            assert all(map(torch.equal, pipeline.encode([words]), plain))
    assert torch.equal(draw(pipeline, "a (red:1.0) cube"), draw(pipeline, "a red cube", prompt_syntax="off"))


def test_the_further_from_one_the_further_the_vectors_move(pipeline) -> None:
    plain = pipeline.encode(["a red cube"])[0]

    def distance(weight: float) -> float:
        return float((pipeline.encode([read(f"a (red:{weight}) cube")])[0] - plain).norm())

    up = [distance(weight) for weight in (1.0, 1.1, 1.4, 1.7, HEAVIEST)]
    down = [distance(weight) for weight in (1.0, 0.9, 0.6, 0.3, 0.0)]
    assert up[0] == down[0] == 0
    assert up == sorted(set(up)) and down == sorted(set(down))
    assert up[-1] == pytest.approx(down[-1])  # both lie on one line


def test_a_weight_of_zero_is_the_prompt_without_the_words(pipeline) -> None:
    found = pipeline.encode([read("a (red:0) cube")])[0][0]
    without = pipeline.encode(["a cube"])[0][0]
    assert torch.allclose(found[[0, 2, 3]], without, atol=1e-6)
    assert torch.allclose(found[1], pipeline.encode([""])[0][0, -1], atol=1e-6)


def test_negative_prompts_have_weights_too_in_both_ways(pipeline) -> None:
    for way in ("own", "prompt"):
        plain, less, none = (
            draw(pipeline, "a red cube", negative_prompt=text, null_caption=way)
            for text in ("a blue ball", "a (blue:0.4) ball", "a (blue:1) ball")
        )
        assert torch.equal(plain, none)
        assert not torch.equal(plain, less)


def test_published_null_captions_weigh_their_own_words_only(pipeline) -> None:
    mask = torch.ones(1, 9)
    plain = pipeline.encode_null(["a blue ball"], mask)[0][0]
    weighted = pipeline.encode_null([read("a (blue:0.5) ball")], mask)[0][0]
    assert torch.equal(weighted[4:], plain[4:]) and not torch.equal(weighted[:4], plain[:4])
    own = pipeline.encode([read("a (blue:0.5) ball")])[0][0]
    assert torch.allclose(weighted[:4], own, atol=1e-6)


def test_the_cache_holds_plain_vectors_only_and_changes_nothing(pipeline, tiny_toy_folder: Path) -> None:
    texts = [
        read("a (red:1.5) cube"),
        read("a (red:0.5) cube"),
        Words("a red cube"),
        read("(a red cube:1.2)"),
    ]
    expected = pipeline.encode(texts, long_prompt="chunks")
    calls: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline.embeddings = Embeddings(tiny_toy_folder, "float32")
    for _ in range(2):
        assert all(map(torch.equal, pipeline.encode(texts, long_prompt="chunks"), expected))
    assert len(calls) == 3  # the text, the text without "red", and the empty text
    for text in ("a red cube", ""):  # each under its own name, as if there were no weights
        kept = pipeline.embeddings.get(text, len(pipeline.tokenizer(text).input_ids))
        assert torch.equal(kept, pipeline.encode([text])[0][0])
    assert len(calls) == 3


# --- Long texts


def test_chunks_are_cut_at_borders_and_lose_nothing(pipeline) -> None:
    for limit in (4, 6, 12, 20):
        cuts = chunks(pipeline._length, LONG, limit)
        parts = [LONG[a:b] for a, b in cuts]
        assert "".join(parts) == LONG
        assert all(pipeline._length(part) <= limit for part in parts)
    assert parts[0].endswith("torus. ") and parts[1].startswith("two small balls")
    assert chunks(pipeline._length, LONG, 300) == [(0, len(LONG))]
    assert chunks(pipeline._length, "", 5) == [(0, 0)]


def test_a_word_longer_than_a_chunk_is_cut(pipeline) -> None:
    text = "x" * 30
    cuts = chunks(pipeline._length, text, 8)
    assert "".join(text[a:b] for a, b in cuts) == text and len(cuts) > 3
    assert all(pipeline._length(text[a:b]) <= 8 for a, b in cuts)


def test_long_prompts_are_read_in_parts(pipeline) -> None:
    options = {"max_sequence_length": 12}
    vectors, mask = pipeline.encode([LONG], long_prompt="chunks", **options)
    parts = pipeline.parts_read(LONG, 12)
    assert len(parts) > 1 and mask.all()
    assert torch.equal(vectors[0], torch.cat([pipeline.encode([part])[0][0] for part in parts]))
    assert pipeline.encode([LONG], **options)[0].shape[1] == 12
    short = pipeline.encode(["a red cube"], long_prompt="chunks", **options)
    assert all(map(torch.equal, short, pipeline.encode(["a red cube"], **options)))
    cut, whole = (draw(pipeline, LONG, long_prompt=way, **options) for way in ("cut", "chunks"))
    assert not torch.equal(cut, whole)


def test_weights_keep_their_words_in_chunks(pipeline) -> None:
    text = LONG.replace("pink", "(pink:0)")
    found = pipeline.encode([read(text)], max_sequence_length=12, long_prompt="chunks")[0][0]
    plain = pipeline.encode([LONG], max_sequence_length=12, long_prompt="chunks")[0][0]
    last = len(pipeline.tokenizer(pipeline.parts_read(LONG, 12)[-1]).input_ids)
    assert torch.equal(found[:-last], plain[:-last])
    assert not torch.equal(found[-last:], plain[-last:])


def test_chunks_go_with_every_null_caption_and_with_plain(pipeline) -> None:
    for way in ("own", "prompt"):
        options = {
            "long_prompt": "chunks",
            "max_sequence_length": 12,
            "null_caption": way,
            "negative_prompt": LONG,
        }
        lean = draw(pipeline, LONG, **options)
        pipeline.prepare("plain")
        assert torch.allclose(draw(pipeline, LONG, **options), lean, atol=2e-4)
        pipeline.prepare("lean")


# --- Pictures


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_turns_of_the_same_words_change_nothing(pipeline, guidance: float) -> None:
    options = {"guidance_scale": guidance}
    plain = draw(pipeline, "a red cube", **options)
    assert torch.equal(draw(pipeline, "a [red|red] cube", **options), plain)
    assert torch.equal(draw(pipeline, "a [red:blue:1] cube", **options), plain)
    assert torch.equal(draw(pipeline, "a [blue:red:0] cube", **options), plain)
    assert not torch.equal(draw(pipeline, "a [red|blue] cube", **options), plain)


def test_each_step_reads_its_own_words(pipeline) -> None:
    """As if the prompt were exchanged by hand between the steps."""
    options = {"num_inference_steps": 4, "height": 64, "width": 64, "negative_prompt": "a ball"}
    texts = {text: pipeline.encode(["a ball", f"a {text} cube"]) for text in ("red", "blue")}
    offered = []
    pipeline(
        "a [red|blue] cube",
        **options,
        prompt_syntax="on",
        output_type="latent",
        callback_on_step_end=lambda _, index, timestep, given: offered.append(given["prompt_embeds"]) or {},
        callback_on_step_end_tensor_inputs=("prompt_embeds",),
    )
    for index, captions in enumerate(offered):
        assert torch.equal(captions, texts[("red", "blue")[index % 2]][0])
    # Up to the last step, "[red:blue:0.75]" is the picture of "red".
    walks = [
        [
            step.latents
            for step in pipeline.denoise(
                text, **options, prompt_syntax="on", generator=torch.Generator().manual_seed(0)
            )
        ]
        for text in ("a [red:blue:0.75] cube", "a red cube")
    ]
    assert [torch.equal(*pair) for pair in zip(*walks, strict=True)] == [True, True, True, False]


def test_turns_are_encoded_once_and_only_when_read(pipeline) -> None:
    calls: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    draw(pipeline, "a [red|blue] cube", negative_prompt="a ball")
    assert len(calls) == 3
    calls.clear()
    draw(
        pipeline,
        "a [red|blue|green|pink] cube",
        num_inference_steps=2,
        guidance_scale=1.0,
        negative_prompt="[a|b]",
    )
    assert len(calls) == 2


def test_turns_go_with_plain_savers_and_batches(pipeline) -> None:
    text = "a [red|blue] cube"
    lean = draw(pipeline, text)
    both = pipeline(
        [text, "a (green:1.4) cone"],
        num_inference_steps=4,
        height=64,
        width=64,
        prompt_syntax="on",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="latent",
    ).images
    assert torch.allclose(both[:1], lean, atol=1e-4)
    saved = draw(pipeline, text, savers="guidance=0.0:0.5")
    assert torch.isfinite(saved).all() and not torch.equal(saved, lean)
    same = draw(pipeline, "a [red|red] cube", savers="taylor=2:0")
    assert torch.equal(same, draw(pipeline, "a red cube", savers="taylor=2:0"))
    pipeline.prepare("plain")
    assert torch.allclose(draw(pipeline, text), lean, atol=2e-4)


def test_delta_with_control_takes_turns(tiny_delta_folder: Path) -> None:
    import numpy as np

    pipeline = PixArtDeltaPipeline.from_pretrained(tiny_delta_folder, torch_dtype=torch.float32)
    edges = np.zeros((64, 64), dtype="uint8")
    edges[20:40, 20:40] = 255
    options = {"control_image": edges, "control_kind": "edges", "control_guidance_end": 0.5}
    plain = draw(pipeline, "a red cube", **options)
    assert torch.equal(draw(pipeline, "a [red:blue:1] cube", **options), plain)
    turns = draw(pipeline, "a [red|blue] cube", **options)
    assert not torch.equal(turns, plain)
    assert not torch.equal(turns, draw(pipeline, "a [red|blue] cube"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_syntax": "maybe"}, "prompt_syntax must be one of off, on"),
        ({"long_prompt": "all"}, "long_prompt must be one of cut, chunks"),
        ({"max_sequence_length": 0, "long_prompt": "chunks"}, "max_sequence_length must be an integer"),
        ({"prompt": "a (red:3) cube"}, "not from 0 to 2"),
        ({"negative_prompt": "[a|b"}, "never closed"),
        ({"prompt": "a (red:1.3) cube", "clean_caption": True}, "clean_caption"),
        ({"prompt": " ".join(["[a|b|c]", "[a|b|c|d]", "[a|b|c|d|e]"]), "num_inference_steps": 20}, "16"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(pipeline, options, words: str) -> None:
    calls: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=words):
        next(pipeline.denoise(**{"prompt": "a red cube", "prompt_syntax": "on"} | options))
    assert not calls


def test_off_is_what_diffusers_does(pipeline) -> None:
    """The arguments' default: the text as it stands, its brackets included."""
    text = "a (red:1.3) [a|b] cube"
    found = draw(pipeline, text, prompt_syntax="off")
    vectors, mask = pipeline.encode([text])
    assert torch.equal(found, draw(pipeline, None, prompt_embeds=vectors, prompt_attention_mask=mask))
    assert parse("x") == ("x",)
