"""lm-eval, unmodified, against a running server: log-likelihoods of answers to choose from, and answers generated.

Not in the test extra, since it brings fifty packages: pip install -c constraints.txt "lm_eval[api]==0.4.13"
"""

import json
import math
import os
import subprocess
import sys

import pytest

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import DEMO_FOLDER

pytestmark = pytest.mark.slow

CHOICES = [
    {"question": "What is 27 + 45?", "choices": ["The sum is 72.", "The sum is 71.", "Paris"], "answer": 0},
    {"question": "What is 6 + 7?", "choices": ["12", "13", "14 apples"], "answer": 1},
    {"question": "Say a word.", "choices": ["Köln", "é", "word"], "answer": 2},
]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
CHOOSING = """
task: choosing
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
SAYING = """
task: saying
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def samples(served, tmp_path_factory):
    """samples(task): what lm-eval wrote down for each item."""
    pytest.importorskip("lm_eval", reason="lm-eval 0.4.13 is not installed; the file's first lines say how to get it")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in CHOICES))
    for name, task in (("choosing", CHOOSING), ("saying", SAYING)):
        (folder / f"{name}.yaml").write_text(TASK.format(file=folder / "items.jsonl") + task)
    model = f"model=tiny,base_url={served.url}/v1/completions,tokenizer={DEMO_FOLDER},max_length=4096"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += [
        "--include_path",
        folder,
        "--tasks",
        "choosing,saying",
        "--log_samples",
        "--output_path",
        folder / "out",
    ]
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    def read(task: str) -> list[dict]:
        (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])

    return read


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", device="cpu", dtype="float32", max_total_tokens=4096, kt_cpuinfer=1) as llm:
        yield llm


def test_loglikelihoods_are_those_of_the_engine(samples, llm):
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1)
    told = samples("choosing")
    assert [len(sample["filtered_resps"]) for sample in told] == [3, 3, 3]
    for sample in told:
        for (value, greedy), argument in zip(sample["filtered_resps"], sample["arguments"].values(), strict=True):
            context, ending = argument["arg_0"], argument["arg_1"]
            (output,) = llm.generate([context + ending], asked)
            begins = len(llm.tokenizer.encode(context))
            drawn = output.prompt_logprobs[begins - 1 :]
            assert float(value) == pytest.approx(math.fsum(one.logprob for one in drawn), abs=1e-3)
            assert (str(greedy) == "True") == all(one.top[0][0] == one.token for one in drawn)


def test_answers_are_those_of_the_engine(samples, llm):
    asked = SamplingParams(max_tokens=12, temperature=0, stop=("\n\n",))
    for sample in samples("saying"):
        (output,) = llm.generate([sample["arguments"]["gen_args_0"]["arg_0"]], asked)
        assert sample["resps"] == [[output.text]] and output.text
