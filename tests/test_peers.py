"""Flags of other projects: each is answered with flags that exist here."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from commands import commands, flags
from dspark.cache.shared import peers

# The options of speculators' published GLM-5.2 recipe, program by program.
GLM = {
    "dspark-dump": "--model --data --output --seq-length --assistant-pattern --target-layer-ids "
    "--hidden-states-path",
    "dspark-train": (
        "--verifier-name-or-path --data-path --vllm-endpoint --save-path --epochs --lr "
        "--scheduler-type --total-seq-len "
        "--speculator-type --block-size --max-anchors --num-layers --target-layer-ids "
        "--markov-rank --markov-head-type "
        "--enable-confidence-head --confidence-head-with-markov --loss-fn "
        "--confidence-head-alpha --fsdp-shard --logger "
        "--log-dir --on-missing --on-generate --checkpoint-freq --request-timeout --max-retries"
    ),
}


def test_every_flag_in_the_table_exists_here() -> None:
    known = {name: flags(command) for name, command in commands().items()}
    for program, entry in peers.table().items():
        assert entry["command"] in known, program
        for theirs, (ours, note) in entry["flags"].items():
            assert ours or note, f"{program} {theirs} has no answer"
            command, *named = re.split(r" (?=--)", ours) if ours else ("",)
            for flag in named:
                assert flag in known[command], f"{program} {theirs}: {command} has no {flag}"


@pytest.mark.parametrize("name", GLM)
def test_speculators_glm_recipe(name: str) -> None:
    command = commands()[name]
    for flag in GLM[name].split():
        if flag not in flags(command):
            answer = peers.answer(flag, name)
            assert answer is not None, flag
            assert "speculators" in answer, flag


def run(command: str, *arguments: str) -> tuple[int, str]:
    first, *rest = command.split()
    result = CliRunner().invoke(commands()[first], [*rest, *arguments], prog_name=first)
    return result.exit_code, result.output


def test_commands_answer() -> None:
    code, text = run("dspark-train", "--verifier-name-or-path", "zai-org/GLM-5.2-FP8")
    assert code == 2
    assert "No such option: --verifier-name-or-path" in text
    assert "speculators scripts/train.py: dspark-dump --model" in text
    # By spelling it would be --num-layers.
    code, text = run("dspark-train", "--cache", "hs.zarr", "--target-layer-ids", "8 23")
    assert code == 2
    assert "dspark-dump --target-layer-ids" in text
    assert "--num-layers" not in text
    code, text = run("dspark-tools eval", "--target_name_or_path", "Qwen/Qwen3-4B")
    assert code == 2
    assert "DeepSpec eval.py: dspark-tools eval --model" in text


def test_the_program_that_does_the_same_job_comes_first() -> None:
    assert "DeepSpec eval.py" in str(peers.answer("--temperature", "dspark-tools eval"))
    assert "DeepSpec eval.py" not in str(peers.answer("--temperature", "dspark-dump"))
    assert "dspark-train --epochs" in str(peers.answer("training.num_epochs", "dspark-train"))


def test_a_flag_of_nobody_keeps_clicks_own_message() -> None:
    assert peers.answer("--num-layer", "dspark-train") is None
    code, text = run("dspark-train", "--num-layer", "3")
    assert code == 2
    assert "--num-layers" in text
