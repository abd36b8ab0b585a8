"""Every form of checkpoint loads to the same model; broken ones say what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from osum_echat.config import to_yaml
from osum_echat.model import checkpoint as model_io
from osum_echat.model.config import LlmConfig, LoraConfig
from osum_echat.model.echat import EChatModel
from osum_echat.model.released import CheckpointError, spec_of, to_released
from osum_echat.model.storage import expand_rows, quantize_rows
from tests.model_case import CONFIG, OPTIONS, make_feats, make_model, make_row, run


def same(a: EChatModel, b: EChatModel) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text(to_yaml(CONFIG), encoding="utf-8")
    return file


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "a": 1, "<|im_end|>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("config", [CONFIG, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_a_folder_gives_the_same_model_and_tokenizer(config, shard_bytes: int, tmp_path: Path, tokenizer) -> None:
    model = make_model(config)
    folder = model_io.save_model(model, tokenizer, tmp_path / "ck", max_shard_bytes=shard_bytes)
    again, tok = model_io.load_model(folder)
    assert same(model, again) and not again.training
    assert again.lm.llm.lm_head.weight is again.lm.llm.model.embed_tokens.weight
    assert tok.eos_token_id == 2
    assert len(list(folder.glob("*.safetensors"))) == 1 if shard_bytes > 10**6 else len(list(folder.glob("*.safetensors"))) > 2
    with torch.no_grad():
        first, second = (run(m, [make_row([20])], make_feats([20])).nll_M for m in (model, again))
    assert torch.equal(first, second), "computed tables too are the same"


def test_the_published_file_loads_and_goes_back_complete(tmp_path: Path, config_file: Path) -> None:
    model = make_model()
    file = tmp_path / "language_think_final.pt"
    written = to_released(model.state_dict(), spec_of(model))
    written["ln_speech.weight"] = torch.randn(16)
    torch.save(written, file)
    assert same(model, model_io.load_weights(file, config_file))

    from osum_echat.model.storage import open_source

    tensors = model_io.clean_tensors(open_source(file), spec_of(model))
    back = torch.load(model_io.save_released(tensors, spec_of(model), tmp_path / "back.pt"), weights_only=True)
    assert back.keys() == written.keys()
    assert all(torch.equal(back[k], written[k]) for k in written), "ln_speech, which no one uses, is kept"


@pytest.mark.parametrize("naming", ["ours", "published"])
def test_a_deepspeed_folder_loads_by_tag_and_by_latest(naming: str, tmp_path: Path, config_file: Path) -> None:
    model = make_model()
    state = model.state_dict() if naming == "ours" else to_released(model.state_dict(), spec_of(model))
    tag = tmp_path / "run" / "step_10"
    tag.mkdir(parents=True)
    torch.save({"module": state, "global_steps": 10, "ds_version": "0"}, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "run" / "latest").write_text("step_10")
    assert same(model, model_io.load_weights(tag, config_file))
    assert same(model, model_io.load_weights(tmp_path / "run", config_file))


def test_weights_take_the_dtype_asked_for_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    folder = model_io.save_model(make_model(), None, tmp_path / "ck", storage="float16")
    assert model_io.load_weights(folder).projection.weight.dtype == torch.float16
    model = model_io.load_weights(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        before = model_io.load_weights(folder).projection.weight.clone()
        model_io.load_weights(folder).projection.weight.zero_()
    assert torch.equal(model_io.load_weights(folder).projection.weight, before)


def test_eight_bit_rows_are_small_and_within_their_error(tmp_path: Path) -> None:
    weight = torch.randn(64, 128) * torch.rand(64, 1)
    rows, scale = quantize_rows(weight)
    assert ((expand_rows(rows, scale) - weight).abs().amax(1) <= weight.abs().amax(1) * 0.0045).all()
    model = make_model(dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, dim=96, ffn=200)))
    small = model_io.save_model(model, None, tmp_path / "small", storage="int8")
    large = model_io.save_model(model, None, tmp_path / "large")
    size = {p: (p / "model.safetensors").stat().st_size for p in (small, large)}
    assert size[small] < 0.45 * size[large]
    again = model_io.load_weights(small, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=0.02, rtol=0.01)


def test_saving_replaces_a_folder_whole_and_leaves_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    model_io.save_model(make_model(seed=1), None, folder)
    (folder / "old-note").touch()
    model_io.save_model(make_model(seed=2), None, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "model.safetensors"]
    assert same(model_io.load_weights(folder), make_model(seed=2))


def test_a_folder_names_no_path_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps(CONFIG.llm.config))
    config = dataclasses.replace(CONFIG, llm=LlmConfig(path=str(llm)), tokenizer=str(llm))
    folder = model_io.save_model(make_model(config), None, tmp_path / "ck")
    assert str(tmp_path) not in (folder / "config.yaml").read_text()


def test_a_model_is_built_without_memory_and_without_random_numbers() -> None:
    state = torch.get_rng_state()
    model = model_io.build_meta(dataclasses.replace(CONFIG, lora=LoraConfig(rank=2)))
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_aliases_that_differ_are_refused(tmp_path: Path, config_file: Path) -> None:
    model = make_model()
    state = to_released(model.state_dict(), spec_of(model))
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="are names of one tensor in this model, but differ"):
        model_io.load_weights(tmp_path / "odd.pt", config_file)


def test_broken_and_foreign_files_are_refused_with_a_remedy(tmp_path: Path, config_file: Path) -> None:
    cases = {
        "not there": (tmp_path / "nowhere.pt", "checkpoint not found"),
        "cut": (tmp_path / "cut.safetensors", "cannot be read as safetensors"),
        "objects": (tmp_path / "objects.pt", "cannot be read as plain tensors"),
        "nested": (tmp_path / "nested.pt", "not a flat state dict"),
        "text": (tmp_path / "text.txt", "unknown kind of checkpoint"),
        "empty": (tmp_path / "empty", "holds no model.safetensors"),
    }
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save({"x": config_file}, tmp_path / "objects.pt")
    torch.save({"state": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    (tmp_path / "text.txt").touch()
    (tmp_path / "empty").mkdir()
    for path, message in cases.values():
        with pytest.raises(CheckpointError, match=message):
            model_io.load_weights(path, config_file)
    with pytest.raises(ValueError, match="pass its model config"):
        model_io.load_weights(tmp_path / "cut.safetensors")


def test_a_folder_whose_shard_is_lost_says_which(tmp_path: Path) -> None:
    folder = model_io.save_model(make_model(), None, tmp_path / "ck", max_shard_bytes=20_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        model_io.load_weights(folder)


def test_single_parts_are_copied_strictly(tmp_path: Path) -> None:
    donor = model_io.save_model(make_model(OPTIONS, seed=3), None, tmp_path / "donor")
    model = make_model(seed=4)
    names = model_io.load_parts(model, donor, ["encoder", "lm.llm"])
    source = make_model(OPTIONS, seed=3).state_dict()
    assert all(torch.equal(model.state_dict()[n], source[n]) for n in names)
    assert {n.split(".")[0] for n in names} == {"encoder", "lm"}
    with pytest.raises(CheckpointError, match=r"adapter\.down\.convs\.0\.weight"):  # its input is two layers wide
        model_io.load_parts(model, donor, ["adapter"])
    with pytest.raises(ValueError, match="no part kitchen"):
        model_io.load_parts(model, donor, ["kitchen"])


def test_a_shorter_position_table_fills_the_first_rows(tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, max_positions=50))
    donor = make_model(short)
    donor.encoder.positions_SE += 1
    model = make_model()
    rest = model.encoder.positions_SE[50:].clone()
    model_io.load_parts(model, model_io.save_model(donor, None, tmp_path / "donor"), ["encoder"])
    assert torch.equal(model.encoder.positions_SE[:50], donor.encoder.positions_SE)
    assert torch.equal(model.encoder.positions_SE[50:], rest)


def test_a_missing_tokenizer_says_where_it_may_stand(tmp_path: Path) -> None:
    folder = model_io.save_model(make_model(), None, tmp_path / "ck")
    with pytest.raises(ValueError, match="put one into tokenizer/"):
        model_io.load_model(folder)
