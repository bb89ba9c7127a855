"""The pieces of streamed text join to the text of all tokens, cut where a stop string begins."""

import random

import pytest
import torch

from regard.contract import Unsupported
from regard.serving.text import PlainText, Writer
from regard.tasks.tokenizer import BpeTokenizer, ByteTokenizer

LETTERS = "ab é中🙂\ufffd"
TOKENIZERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: BpeTokenizer.train([("ab é中🙂" * 50).encode()], 262),
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_pieces_add_up_to_the_text_of_all_tokens(make):
    tokenizer, draws = make(), random.Random(torch.initial_seed())
    for _ in range(200):
        text = "".join(draws.choices(LETTERS, k=draws.randint(0, 12)))
        tokens = tokenizer.encode([text.encode()]).tolist()
        for _ in range(draws.choice([0, 0, 3])):  # bytes that are not characters
            tokens.insert(draws.randint(0, len(tokens)), draws.randrange(tokenizer.vocab_size))
        stops = ["".join(draws.choices(LETTERS[:4], k=draws.randint(1, 3))) for _ in range(draws.choice([0, 1, 3]))]
        whole = tokenizer.decode(tokens)
        ends = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
        writer, shown = Writer(tokenizer.decode, stops), ""
        for token in tokens:
            shown += writer.push(token)
            assert whole.startswith(shown), "nothing is shown that is taken back"
        shown += writer.finish()
        assert shown == whole[: min(ends, default=None)] and writer.stopped == bool(ends)


def test_whole_characters_come_at_once_and_what_may_become_a_stop_string_is_held():
    writer = Writer(ByteTokenizer().decode, ["END"])
    assert [writer.push(token) for token in "aéE".encode()] == ["a", "", "é", ""]
    assert writer.push(ord("N")) == "" and writer.push(ord("x")) == "ENx"
    assert [writer.push(token) for token in b"yEND"] == ["y", "", "", ""] and writer.stopped
    assert writer.push(ord("z")) == "" == writer.finish()


def test_a_chat_is_laid_out_by_its_template_and_templates_run_nothing():
    text = PlainText(ByteTokenizer())
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert text.decode(text.chat(chat)) == "system: Be short.\nuser: Hi\nassistant:"
    own = PlainText(ByteTokenizer(), "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert own.decode(own.chat(chat)) == "[Be short.][Hi]"
    with pytest.raises(Unsupported, match="cannot be read"):
        PlainText(ByteTokenizer(), "{% for %}")
    for harmful in ("{{ messages.__class__.__mro__ }}", "{{ 1 / 0 }}"):
        with pytest.raises(Unsupported, match="lay out"):
            PlainText(ByteTokenizer(), harmful).chat(chat)
