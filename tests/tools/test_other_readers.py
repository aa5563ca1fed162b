"""CTranslate2, an independent engine, reads an exported model. Optional: docs/huggingface.md installs it."""

from __future__ import annotations

import pytest

from tests.tools.test_export_hf import MODELS, SCALED, TOKENIZER, trained
from tools import export_hf, generate

ctranslate2 = pytest.importorskip("ctranslate2", reason="needs CTranslate2: pip install ctranslate2")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

MODELS_READ = {
    "bytes, grouped heads": MODELS["bytes, grouped heads"],
    "tied, scaled, padded": [*TOKENIZER, SCALED, "--model.tied_embeddings=true", "--model.vocab_size=4224"],
}
"""Heads wider than dim / heads are not among them: that reader takes them for damage."""
PROMPT, TOKENS = "It was the best of ", 40


@pytest.mark.parametrize("arguments", MODELS_READ.values(), ids=MODELS_READ)
def test_ctranslate2_writes_the_same_greedy_text(tiny, capsys, arguments):
    trained(tiny, *arguments, "--model.head_dim=none")
    exported, converted = tiny.folder / "exported", tiny.folder / "converted"
    assert export_hf.main([str(tiny.directory), str(exported)]) == 0
    ctranslate2.converters.TransformersConverter(str(exported)).convert(str(converted))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    given = tokenizer(PROMPT)["input_ids"]
    reader = ctranslate2.Generator(str(converted), device="cpu")
    [written] = reader.generate_batch(
        [tokenizer.convert_ids_to_tokens(given)], max_length=TOKENS, sampling_topk=1, include_prompt_in_result=False
    )
    capsys.readouterr()
    options = ["--greedy", f"--max-tokens={TOKENS}", "--precision=float32"]
    assert generate.main([str(tiny.directory), PROMPT, *options]) == 0
    assert capsys.readouterr().out == tokenizer.decode(given + written.sequences_ids[0]) + "\n"
