"""Small models trained on made-up text, and the package's commands that use their checkpoints."""

from __future__ import annotations

import json
import os
import re

import numpy as np

from tests import forked
from tests.dist.training_runs import MODEL, succeed

WORDS = "token expert capacity price residual flow score gap sweep dual bound load".split()
# The model without its made-up data, which real text takes the place of.
MODEL_ON_TEXT = re.sub(r"--mock-data.*--vocab-size 127|--split \S+", "", MODEL)
assert "mock" not in MODEL_ON_TEXT


def tool(name, *arguments, **kwargs):
    """Run a command of the package and return its result."""
    return forked.python("-m", "megatron_maxscore", name, *arguments, timeout=900, **kwargs)


def prepare_words(directory):
    """Write documents of a dozen words; return the data made of them."""
    texts, data = directory / "texts", directory / "data"
    texts.mkdir()
    generator = np.random.default_rng(0)
    for index in range(60):
        lines = [" ".join(generator.choice(WORDS, 8)) for _ in range(40)]
        (texts / f"{index}.txt").write_text("\n".join(lines))
    done = tool("prepare", "--input", texts, "--output", data, "--vocab-size", 320)
    assert done.returncode == 0, done.stderr
    return data


def of_data(data):
    """Return Megatron's arguments for prepared data."""
    return (
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {data}/tokenizer.model "
        f"--train-data-path {data}/train_text_document --valid-data-path {data}/valid_text_document"
    )


def train(directory, data, ranks, flags, model=MODEL_ON_TEXT):
    """Train a small model on prepared data into ``directory``/checkpoint."""
    flags += f" --save {directory}/checkpoint --save-interval 1000 {of_data(data)}"
    return succeed(directory, ranks, flags, model=model)


def local_task(directory):
    """Write tasks for lm-evaluation-harness: choices whose right ones are words of the text, texts.

    Returns:
        Arguments of the command, and the environment in which nothing is downloaded.
    """
    items = [
        {"question": "token", "choices": [" expert", " \u6f22\u5b57\u6f22\u5b57"], "answer": 0},
        {"question": "flow", "choices": [" \u00e9\u00e9\u00e9\u00e9", " score"], "answer": 1},
        {"question": "gap", "choices": [" ZZZZZZ", " load"], "answer": 1},
    ]
    tasks = directory / "tasks"
    tasks.mkdir()
    (tasks / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tasks / "local_items.yaml").write_text(
        "task: local_items\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks}/items.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    (tasks / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{' '.join(WORDS)} {word}\n"}) for word in WORDS)
    )
    (tasks / "local_texts.yaml").write_text(
        "task: local_texts\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks}/texts.jsonl\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n"
    )
    environment = {
        **os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "cache"),
    }  # fmt: skip
    return ("--include", tasks, "--tasks", "local_items", "local_texts"), environment
