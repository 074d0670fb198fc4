"""What is kept of pictures and prompts: never given to another picture, void with other weights, and worth keeping."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.batch import Example, message
from mmllm.inference.byte_cache import ByteCache
from mmllm.inference.engine import Engine
from mmllm.inference.kv_cache import StoredRow
from mmllm.inference.picture_features import picture_key, transform_key
from mmllm.inference.prefix_cache import MAX_ROWS_A_GROUP, Prefix, PrefixCache
from mmllm.inference.sampling import Sampling
from tests.builders.conversations import A, B, asked, generate, picture
from tests.builders.tiny import SIDE_PX, make_checkpoint

NUM_PAIRS = 1200  # of each kind of adversary
COMPUTED = 10  # the features of every tenth pair are computed, kept and compared
IMAGE_UNIQUE_ID = 0xA420
NEW = Sampling(max_new_tokens=6)
TALK = (
    message("user", "<image>\nis there a red circle in the picture, or is there a blue square in it?"),
    message("assistant", "a small red circle"),
)


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


def one_pixel_off(pixels: Any, rng: np.random.Generator) -> Any:
    other, (height, width, _) = pixels.copy(), pixels.shape
    place = (rng.integers(height), rng.integers(width), rng.integers(3))
    other[place] = (int(other[place]) + int(rng.integers(1, 256))) % 256
    return other


def tiles_exchanged(pixels: Any, rng: np.random.Generator) -> Any:
    """The same pixels, values and counts, with two patches of the tower in each other's place."""
    side = SIDE_PX // 4
    places = [(row * side, column * side) for row in range(4) for column in range(4)]
    (top, left), (low, right) = (places[number] for number in rng.choice(16, 2, replace=False))
    other = pixels.copy()
    other[top : top + side, left : left + side] = pixels[low : low + side, right : right + side]
    other[low : low + side, right : right + side] = pixels[top : top + side, left : left + side]
    return other


def as_file(pixels: bytes) -> bytes:
    """A PNG with the same EXIF ImageUniqueID as every other."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[IMAGE_UNIQUE_ID] = "the same id in all of them"
    file = io.BytesIO()
    Image.frombytes("RGB", (SIDE_PX, SIDE_PX), pixels).save(file, "PNG", exif=exif, compress_level=0)
    return file.getvalue()


@pytest.mark.parametrize("change", [one_pixel_off, tiles_exchanged])
def test_a_picture_never_gets_the_features_of_another(engine: Engine, change: Any, tmp_path: Path) -> None:
    """Pairs of one path, one file size, one time and one EXIF id. Each is asked for after the other was kept."""
    rng, path = np.random.default_rng(0), tmp_path / "the same name.png"
    engine.start()
    features = engine.scheduler.decoder.features  # type: ignore[union-attr]
    for number in range(NUM_PAIRS):
        pixels = rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        pictures, sizes = [], set()
        for values in (pixels, change(pixels, rng)):
            path.write_bytes(as_file(values.tobytes()))
            os.utime(path, (0, 0))
            sizes.add(path.stat().st_size)
            pictures += engine.read_pictures([asked("<image>?", str(path))])[0]  # type: ignore[arg-type]
        assert len(sizes) == 1
        one, other = pictures
        assert one.key != other.key
        if number % COMPUTED:
            continue
        with torch.inference_mode():
            features.of([one])
            held = features.of([other, one])
            for tokens, source in zip(held, (other, one), strict=True):
                inputs = source.prepared.inputs["pixel_values"]
                fresh = engine.model.project_images(engine.model.encode_images(inputs))
                torch.testing.assert_close(tokens, fresh, rtol=1e-4, atol=1e-5)
        assert not torch.equal(*held)
    assert features.cache.num_hits >= NUM_PAIRS / COMPUTED


def test_the_key_of_a_picture_is_that_of_its_pixels_and_of_the_transform(
    engine: Engine, tiny_parts: Path, tmp_path: Path
) -> None:
    for suffix in ("png", "bmp", "tiff"):  # other files, the same pixels
        A.save(tmp_path / f"a.{suffix}")
    files = [engine.read_pictures([asked("<image>?", str(path))])[0][0] for path in sorted(tmp_path.iterdir())]  # type: ignore[arg-type]
    assert len({one.key for one in files}) == 1
    padded = Engine.load(make_checkpoint(tmp_path / "pad", tiny_parts, image_mode="pad"), device="cpu")
    keys = {
        picture_key(one.prepared, transform_key(other.processor))
        for one, other in itertools.product(files[:1], (engine, padded))
    }
    assert len(keys) == 2


def replies_of(engine: Engine, *examples: Example) -> list[str]:
    return [engine.reply(example, NEW).text for example in examples]


def expected_of(engine: Engine, *examples: Example) -> list[str]:
    new = NEW.max_new_tokens
    return [engine.renderer.decode(generate(engine, example, max_new_tokens=new)[0].tolist()) for example in examples]


def test_a_second_question_uses_what_is_known_and_gets_the_same_answer(engine: Engine) -> None:
    first = Example("first", "", TALK[:1], (A,))
    questions = [asked("<image>\nis there a red circle in the picture, and where is it?", image) for image in (A, B)]
    turns = Example("talk", "", (*TALK, message("user", "and where is it?")), (A,))
    engine.reply(first, NEW)
    same, other = (engine.reply(question, NEW) for question in questions)
    talk = engine.reply(turns, NEW)
    assert [reply.text for reply in (same, other, talk)] == expected_of(engine, *questions, turns)
    image_tokens = same.num_image_tokens
    assert same.num_cached_tokens > image_tokens, "the picture and the words before the difference"
    assert talk.num_cached_tokens > image_tokens
    assert other.num_cached_tokens == 0, "another picture at the same place"


def test_prompts_with_and_without_known_beginnings_share_a_batch(engine: Engine) -> None:
    examples = [
        asked("<image>\nwhat is in the picture?", A),
        asked("<image>\nwhat is in the picture, and in which place?", A),
        asked("<image>\nwhat is it like <image>, what is it?", A, B),
        asked("<image>\nwhat is it like <image>, what is it?", A, picture(9, 40, 40)),
        asked("<image>\nwhat is it like <image>, and how many are there?", A, B),
        asked("is it round?"),
    ]
    expected = expected_of(engine, *examples)
    for order in (range(6), (2, 0, 5), range(6), (4, 3, 1)):
        replies = engine.reply_batch([examples[number] for number in order], NEW)
        assert [reply.text for reply in replies] == [expected[number] for number in order]
    assert sum(reply.num_cached_tokens > 0 for reply in replies) == 3


def test_other_weights_make_what_was_kept_void(engine: Engine) -> None:
    question = asked("<image>\nwhat is in the picture?", A)
    before = replies_of(engine, question, question)
    with torch.no_grad():
        for weight in engine.model.projector.parameters():
            weight.mul_(-3)
    after = replies_of(engine, question)
    assert after == expected_of(engine, question)
    assert after[0] != before[0]


def test_caches_hold_no_more_than_their_bytes_and_can_be_off(engine: Engine) -> None:
    cache: ByteCache[int, str] = ByteCache(10)
    for key, size in ((1, 4), (2, 4), (3, 11)):
        cache.put(key, str(key), size)
    assert (cache.get(3), cache.get(1)) == (None, "1"), "what is larger than the cache is not kept"
    cache.put(4, "4", 4)
    assert cache.num_bytes == 8
    assert [cache.get(key) for key in (1, 2, 4)] == ["1", None, "4"], "2 was used least recently"
    off = Engine(engine.model, engine.processor, name="x", feature_cache_bytes=0, prefix_cache_bytes=0)
    question = asked("<image>\nwhat is in the picture?", A)
    assert replies_of(off, question, question) == expected_of(engine, question) * 2
    assert off.reply(question, NEW).num_cached_tokens == 0


def test_a_prompt_is_compared_with_few_rows_however_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(num_tokens: int) -> StoredRow:
        return StoredRow(((torch.zeros(1, 1, num_tokens, 2), torch.zeros(1, 1, num_tokens, 2)),))

    def prefix(number: int, picture: bytes) -> Prefix:
        return Prefix(np.array([1, 9, 2, 3, number]), (1,) if picture else (), (picture,) if picture else ())

    compared = []
    num_shared = Prefix.num_shared
    monkeypatch.setattr(Prefix, "num_shared", lambda one, other: compared.append(other) or num_shared(one, other))
    cache = PrefixCache(max_bytes=2**20)
    for number in range(300):
        cache.put(prefix(number, b"%d" % number), stored(5))
    assert not compared
    assert cache.find(prefix(7, b"5"))[1] == 4
    assert len(compared) == 1, "the one row of that picture"
    for number in range(300):
        cache.put(prefix(number, b""), stored(5))
    compared.clear()
    assert cache.find(prefix(299, b""))[1] == 4, "the last token is left to compute"
    assert len(compared) == MAX_ROWS_A_GROUP
    small = PrefixCache(max_bytes=3 * stored(5).num_bytes)
    for number in range(5):
        small.put(prefix(number, b""), stored(5))
    compared.clear()
    small.find(prefix(4, b""))
    assert len(compared) == 3, "as many as there is memory for"


def test_shared_tokens_end_where_pictures_differ() -> None:
    def prefix(ids: list[int], starts: tuple[int, ...], keys: tuple[bytes, ...]) -> Prefix:
        return Prefix(np.array(ids), starts, keys)

    one = prefix([1, 9, 9, 2, 9, 9, 3], (1, 4), (b"a", b"b"))
    assert one.num_shared(one) == 7
    assert one.num_shared(prefix([1, 9, 9, 2, 9, 9, 3, 4], (1, 4), (b"a", b"c"))) == 4
    assert one.num_shared(prefix([1, 9, 9, 2, 9, 9, 3], (1, 4), (b"c", b"b"))) == 1
    assert one.num_shared(prefix([1, 9, 9, 5], (1,), (b"a",))) == 3
    assert one.num_shared(prefix([5], (), ())) == 0
