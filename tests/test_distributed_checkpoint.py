"""Checkpoints of ranks: whole or not at all, and readable on another number of ranks."""

import re

import pytest
import torch
from checkpoint_cases import (
    loaded,
    objects_of_one_rank,
    steps_of_one_rank,
    trained,
    with_options,
)
from train_cases import assert_same_bits

from fastgt.distributed import Group, checkpoint, load_checkpoint, save_checkpoint


def rank_0(ranks, size, function, *args, **options):
    """-> what rank 0 of so many gives, which the others give too."""
    if size == 1:
        return function(Group(), *args, **options)
    answers = ranks.run(size, with_options, function, args, options)
    for answer in answers[1:]:
        assert_same_bits(answer, answers[0])
    return answers[0]


def test_ranks_go_on_with_the_bits_that_they_would_have_had(ranks, tmp_path):
    whole = rank_0(ranks, 2, trained, tmp_path, 5, save_at=3)
    assert_same_bits(rank_0(ranks, 2, trained, tmp_path, 5, resume=True), whole)


def test_one_process_goes_on_with_the_bits_that_it_would_have_had(tmp_path):
    whole = trained(None, tmp_path, 4, save_at=2)
    assert_same_bits(trained(None, tmp_path, 4, resume=True), whole)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_goes_on(ranks, tmp_path, size):
    rank_0(ranks, 2, trained, tmp_path, 5, save_at=3)
    at_3 = rank_0(ranks, 2, trained, tmp_path, 3, resume=True)
    options = {"resume": True, "any_partition": True}
    assert_same_bits(rank_0(ranks, size, trained, tmp_path, 3, **options), at_3)
    model, optimizer = rank_0(ranks, size, trained, tmp_path, 5, **options)
    whole = rank_0(ranks, 2, trained, tmp_path, 5, resume=True)
    assert_close(model, whole[0])
    assert_close(optimizer["state"], whole[1]["state"])


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        if isinstance(x, dict):
            assert_close(found[key], x)
        else:
            torch.testing.assert_close(found[key], x, rtol=1e-10, atol=1e-12)


def test_another_partition_is_refused_on_every_rank(ranks, tmp_path):
    save_checkpoint(tmp_path, torch.nn.Linear(2, 1), partition="abc")
    for answer in ranks.answers(2, loaded, tmp_path, 2, "def"):
        assert answer.kind == "ValueError"
        assert "is of partition abc, not def" in answer.message
    assert [x["partition"] for x in ranks.run(2, loaded, tmp_path, 2, "abc")] == ["abc"] * 2
    assert loaded(None, tmp_path)["partition"] == "abc"


def interrupted(folder, monkeypatch, **options):
    """What a process leaves that ends before it says that the checkpoint is whole."""

    def ends(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_publish", ends)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, torch.nn.Linear(2, 1), **options)


def test_what_is_half_written_is_named(ranks, tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch)
    (half,) = (x.name for x in tmp_path.iterdir())
    told = f"has a checkpoint that was not written to the end: {half}"
    with pytest.raises(ValueError, match=told):
        loaded(None, tmp_path)
    for answer in ranks.answers(2, loaded, tmp_path):
        assert told in answer.message


def test_a_half_written_one_leaves_the_one_before(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    save_checkpoint(tmp_path, model, step=1)
    with torch.no_grad():
        model.weight.fill_(3)
    interrupted(tmp_path, monkeypatch, step=2)
    assert load_checkpoint(tmp_path, model)["step"] == 1
    assert_same_bits(dict(model.state_dict()), before)
    # the next one takes both away
    save_checkpoint(tmp_path, model, step=3)
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names[0] == "checkpoint.json"
    assert re.fullmatch(r"step-3-[0-9a-f]{16}", names[1])
    assert len(names) == 2
    assert load_checkpoint(tmp_path, model)["step"] == 3


def test_ranks_that_write_different_things_are_told(ranks, tmp_path):
    for answer in ranks.answers(2, steps_of_one_rank, tmp_path):
        assert answer.message.startswith("ranks disagree about step of save_checkpoint")
    first, second = ranks.answers(2, objects_of_one_rank, tmp_path)
    assert first.message.startswith("rank 1 refuses the arguments of save_checkpoint")
    assert second.kind == "TypeError"
    assert "tensors, numbers, texts, lists and dicts" in second.message


@pytest.mark.parametrize("name", ["run.pt", "__0_0.distcp", ".metadata"])
def test_a_damaged_file_is_named(tmp_path, name):
    model = torch.nn.Linear(2, 1)
    save_checkpoint(tmp_path, model)
    (folder,) = (x for x in tmp_path.iterdir() if x.is_dir())
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged"):
        load_checkpoint(tmp_path, model)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is absent"):
        load_checkpoint(tmp_path, model)


def test_what_is_no_checkpoint_of_this_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint"):
        loaded(None, tmp_path / "none")
    model = torch.nn.Linear(2, 1)
    save_checkpoint(tmp_path, model)
    with pytest.raises(ValueError, match=r"'weight' is \[1, 2\] there and \[1, 3\] here"):
        loaded(None, tmp_path, 3)
    with pytest.raises(ValueError, match=r"the checkpoint has no '0.bias'"):
        load_checkpoint(tmp_path, torch.nn.Sequential(model))
    with pytest.raises(ValueError, match="the model has no 'bias'"):
        load_checkpoint(tmp_path, torch.nn.Linear(2, 1, bias=False))
    with pytest.raises(ValueError, match="was written without an optimizer"):
        load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    save_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="an optimizer of 2 parameters, and this one has 1"):
        load_checkpoint(tmp_path, model, torch.optim.SGD([model.weight]))
    for bad, kind in ((-1, ValueError), ("3", TypeError)):
        with pytest.raises(kind, match="step must"):
            save_checkpoint(tmp_path, model, step=bad)
    with pytest.raises(TypeError, match="partition must be a DistributedGraph or a hash, got int"):
        save_checkpoint(tmp_path, model, partition=3)
    text = (tmp_path / "checkpoint.json").read_text()
    (tmp_path / "checkpoint.json").write_text(text.replace("null", '"abc"'))
    with pytest.raises(ValueError, match=r"checkpoint.json is damaged"):
        load_checkpoint(tmp_path, model)
