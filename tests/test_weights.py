"""Weight files of the field, in and out: layouts, parts, prefixes, extras, what is refused and how, and round trips
through transformers.

Each layout is a file written here with random weights; the oracle is transformers where it has the family, else the
formula in float64.
"""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import model as M
import probe
from test_model import TINY, clip, gap, loud, patterned, tiny
from test_vjepa21 import encode

D = 192
PIXELS = dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])


@pytest.fixture(scope="module")
def video():
    """The state of a vit_t whose weights are far from initial ones."""
    torch.manual_seed(0)
    return loud(M.ViT(**M.SIZES["vit_t"], patch=8, frames=8, size=32, rope_quirk=True)).state_dict()


def image_state(video, cls):
    """timm's names: a 2-D patch embedding and positions, with CLS's row first."""
    g = torch.Generator().manual_seed(1)
    flat = video["patch_embed.proj.weight"][:, :, 0].clone()
    state = {**video, "patch_embed.proj.weight": flat, "pos_embed": torch.randn(1, 16 + cls, D, generator=g)}
    return {**state, "cls_token": torch.randn(1, 1, D, generator=g)} if cls else state


def test_parts_prefixes_and_extras(video, tmp_path):
    """The same encoder under every wrapper's names, in every part, bare, and beside what is not it, gives the same
    features; FILE#PART takes the part that is named."""
    decoder = {"decoder_embed.weight": torch.zeros(8, D), "mask_token": torch.zeros(1, 1, 8)}
    other = {name: torch.zeros_like(value) for name, value in video.items()}
    named = {
        "compiled": {"target_encoder": {f"_orig_mod.module.backbone.{k}": v for k, v in video.items()}},
        "blocks_compiled": {"target_encoder": {k.replace(".attn.", "._orig_mod.attn."): v for k, v in video.items()}},
        "plain": {**video, "epoch": 3, "best": np.float64(0.5)},
        "distilled": {"encoder": other, "ema_encoder": video, "target_encoder": other},
        "lightning": {"state_dict": {f"model.encoder.{k}": v for k, v in video.items()}},
        "head": {"model": {**video, **decoder, "head.weight": torch.zeros(3, D)}, "optimizer": {}, "epoch": 1},
    }
    want = None
    for name, file in named.items():
        torch.save(file, tmp_path / f"{name}.pt")
        encoder, config = M.load_encoder(tmp_path / f"{name}.pt")
        assert (config["model"], config["rope_quirk"], config["size"]) == ("vit_t", True, 256)
        with torch.no_grad():
            z = encoder(clip())
        want = z if want is None else want
        assert torch.equal(z, want), name
    student, _ = M.load_encoder(f"{tmp_path}/distilled.pt#encoder")
    assert not any(p.any() for p in student.parameters())
    assert M.load_encoder(f"random:{tmp_path}/distilled.pt#encoder")[1]["width"] == D
    (tmp_path / "a#b.pt").write_bytes((tmp_path / "plain.pt").read_bytes())
    M.load_encoder(tmp_path / "a#b.pt")
    with pytest.raises(ValueError, match=r"no weights in 'foo'; the file holds \['ema_encoder', 'encoder'"):
        M.load_encoder(f"{tmp_path}/distilled.pt#foo")


# class, its config's further entries, our layout of the same weights as the papers' code saves them
IMAGE_MODELS = {
    "ViTModel": {},
    "ViTMAEModel": dict(mask_ratio=0.0),
    "IJepaModel": {},
}


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_image_encoders_equal_transformers(kind, tmp_path):
    """HF's folder and, of the same weights, the file that I-JEPA's, MAE's or timm's own code saves: features to
    1e-5."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("Model", "Config"))(
        hidden_size=D, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, **IMAGE_MODELS[kind])
    oracle = getattr(transformers, kind)(config).eval()
    for name, p in oracle.named_parameters():
        p.data.normal_(float("norm" in name and name.endswith("weight")), 0.1)
    oracle.save_pretrained(tmp_path / "hf")
    encoder, said = M.load_encoder(tmp_path / "hf")
    assert (said["images"], said["size"], said["heads"], said["eps"]) == (True, 32, 3, 1e-6)
    state = encoder.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    if said["cls"]:
        # CLS's position is a row of the table in their files
        row = 0.1 * torch.randn(1, 1, D)
        state["cls_token"] = state["cls_token"] - row
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], 1)
    part = "model" if said["cls"] else "target_encoder"
    extra = {"decoder_pos_embed": torch.zeros(1, 17, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    torch.save({part: {f"module.{k}": v for k, v in (state | extra).items()}, "predictor": {}}, tmp_path / "own.pth")
    x = clip(2, 3)
    differences = []
    with torch.no_grad():
        # HF's MAE shuffles its tokens by this
        noise = dict(noise=torch.arange(16.0).expand(6, 16)) if "MAE" in kind else {}
        want = oracle(x.transpose(1, 2).flatten(0, 1), **noise).last_hidden_state.unflatten(0, (2, 3))
        if said["cls"]:
            want = torch.cat([want[:, :, 0], want[:, :, 1:].flatten(1, 2)], 1)
        else:
            want = want.flatten(1, 2)
        for path in ("hf", "own.pth"):
            differences.append(gap(M.load_encoder(tmp_path / path)[0](x), want))
    print(f"max difference to {kind}, HF's folder and own layout: %.1e %.1e" % tuple(differences))
    assert max(differences) < 1e-5


def vjepa21_file(path, distilled=False, patch=8):
    """V-JEPA 2.1's layout of random weights: a norm a level, two patch embeddings, modality vectors; a predictor with
    two input and two output layers, or of distilled files one input layer and a wider output."""
    torch.manual_seed(0)
    shape = dict(patch=patch, frames=8, size=6 * patch, levels=4, stills=True, rope_scaled=16)
    encoder = loud(M.ViT(**M.SIZES["vit_t"], **shape))
    given = dict(in_width=D, out_width=320, context=True) if distilled else dict(
        in_width=4 * D, out_width=4 * D, hidden=D, context=True)
    predictor = loud(M.Predictor(**given, width=48, depth=2, heads=12, grid=encoder.grid, stills=True, rope_scaled=16))
    state = {}
    for name, value in encoder.state_dict().items():
        name = "norms_block.3." + name.removeprefix("norm.") if name.startswith("norm.") else name
        state[f"module.backbone.{name.replace('level_norms', 'norms_block')}"] = value
    whole = {f"module.{k}": v for k, v in predictor.state_dict().items()}
    part = "ema_encoder" if distilled else "target_encoder"
    torch.save({part: state, "encoder": state, "predictor": whole, "opt": {}, "epoch": 1}, path)
    return encoder, predictor


def test_vjepa21_features_equal_the_formula(tmp_path):
    """A file in V-JEPA 2.1's layout: four levels of a clip that is not square, and of one image, are those of a
    float64 numpy forward; the plain output is the last level; predictor and distilled files load."""
    encoder, predictor = vjepa21_file(tmp_path / "vjepa21.pt")
    loaded, config = M.load_encoder(tmp_path / "vjepa21.pt")
    wanted = dict(levels=4, stills=True, rope_quirk=False, rope_scaled=16, pos="rope", model="vit_t", heads=3)
    assert {name: config[name] for name in wanted} == wanted
    for x in (clip(1, 4, 48)[..., :32], clip(1, 1, 48)):
        with torch.no_grad():
            z = loaded(x, levels=True)
            last = loaded(x)
        levels = encode(encoder.state_dict(), x[0].double().numpy(), 3, 16, [3, 6, 9, 12])
        want = torch.from_numpy(np.concatenate(levels, 1))[None]
        print(f"max difference of V-JEPA 2.1 to numpy: {gap(z, want):.1e} of features up to {z.abs().max():.1f}")
        assert z.shape[2] == 4 * D and gap(z, want) < 5e-5 and torch.equal(z[..., -D:], last)
    guess, said = M.load_predictor(tmp_path / "vjepa21.pt", frames=8, size=48)
    assert (said["hidden"], said["context"], said["stills"], said["heads"]) == (D, True, True, 12)
    keep, pred = torch.arange(9).expand(2, 9), torch.arange(9, 20).expand(2, 11)
    with torch.no_grad():
        z = encoder(clip(2, 8, 48), keep, levels=True)
        ours, theirs = guess([z], [keep], [pred], context=True), predictor([z], [keep], [pred], context=True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, theirs)) and ours[1][0].shape == (2, 9, 4 * D)
    vjepa21_file(tmp_path / "coarse.pt", patch=64)
    surprise, about = probe.forecaster(probe.Args("physics", encoder=str(tmp_path / "coarse.pt")), "cpu")
    assert about["size"] == 384 and surprise(clip(2, 4, 384), 2).shape == (2,)
    encoder, _ = vjepa21_file(tmp_path / "distilled.pt", distilled=True)
    assert gap(M.load_encoder(tmp_path / "distilled.pt")[0](clip(1, 4, 48)), encoder(clip(1, 4, 48))) == 0
    assert M.load_predictor(tmp_path / "distilled.pt")[1]["out_width"] == 320
    with pytest.raises(data.DataError, match="its predictor answers for another encoder, its teacher"):
        probe.forecaster(probe.Args("physics", encoder=str(tmp_path / "distilled.pt")), "cpu")


def our_file(path, video, **entries):
    encoder = M.ViT(**M.SIZES["vit_t"], patch=8, frames=8, size=32)
    config = {name: value for name, value in (encoder.config | PIXELS | entries).items() if value is not ...}
    save_file(video, path, metadata={"config": json.dumps(config)})


def hf_folder(folder, **entries):
    folder.mkdir()
    config = dict(
        model_type="vjepa2", hidden_size=48, num_hidden_layers=1, num_attention_heads=2, patch_size=16, crop_size=32,
        layer_norm_eps=1e-6, hidden_act="gelu", frames_per_clip=4, tubelet_size=2, mlp_ratio=4.0)
    (folder / "config.json").write_text(json.dumps(config | entries))
    save_file({"encoder.layernorm.weight": torch.ones(48)}, folder / "model.safetensors")


def test_malformed_files_are_one_line(video, tmp_path):
    """Each names the file, the family where it is known, and the first key or entry that does not fit, in one line of
    at most 200 characters; a huge depth is refused before it is built."""
    image = image_state(video, True)
    files = {
        "no_part.pt": ({"encoder": video, "opt": {}}, r"no weights in 'target_encoder'; the file holds \['encoder'"),
        "no_table.pt": ({**video, "patch_embed.proj.weight": torch.zeros(D, 3, 8, 8)}, r"I-JEPA\): missing pos_embed"),
        "table.pt": ({**image, "pos_embed": torch.zeros(1, 16, D)}, r"timm's ViT\): wrong shape pos_embed \(1, 16, "),
        "table_1d.pt": ({**image, "pos_embed": torch.zeros(3)}, r"wrong shape pos_embed \(3,\)"),
        "scalar.pt": ({**video, "patch_embed.proj.weight": torch.zeros(())}, r"\(V-JEPA 2\): wrong shape patch_embed"),
        "extra.pt": ({**video, "zzz": torch.zeros(1), "zzzz": torch.zeros(1)}, r"Unexpected key.*zzz.*zzzz"),
        "deep.pt": ({**video, "blocks.999999999.x": torch.zeros(1)}, r"depth 1000000000"),
        "scale.pt": ({**image, "blocks.0.ls1.gamma": torch.zeros(())}, "dimension 0"),
        "bias.pt": ({**video, "blocks.0.attn.query.bias": torch.zeros(3), "blocks.0.attn.value.bias": torch.zeros(())},
                    "cannot be concatenated"),
        "empty.pt": ({"model": {}}, "no weights in 'model'"),
        "nan.pt": ({**video, "norm.weight": torch.full((D,), torch.nan)}, r"not finite norm.weight"),
        "list.pt": ([1, 2], "it holds a list"),
        "twice.pt": ({**video, "module.norm.weight": torch.ones(D)}, "holds norm.weight twice"),
    }
    configs = [
        (dict(heads=0), "heads must be int, 1 to 100000, not 0"), (dict(heads=-4), "heads must be int"),
        (dict(patch=0), "patch must be int"), (dict(depth=10**6), "depth must be int, 1 to 1000, not 1000000"),
        (dict(depth="12"), "depth must be int, 1 to 1000, not '12'"), (dict(mlp=None), "mlp must be int"),
        (dict(eps="x"), "eps must be float, 0 to 1, not 'x'"), (dict(act="swish"), "act must be one of"),
        (dict(std=[1, 2]), "std must be float"), (dict(mean=0.5), "mean must be float"), (dict(mlp=...), "lacks mlp"),
        (dict(width=...), "lacks width"), (dict(stride="x"), "stride must be float"), (dict(size=True), "size must be"),
    ]
    refused = []
    for name, (file, message) in files.items():
        torch.save(file, tmp_path / name)
        refused.append((tmp_path / name, message))
    for i, (entries, message) in enumerate(configs):
        our_file(tmp_path / f"{i}.safetensors", video, **entries)
        refused.append((tmp_path / f"{i}.safetensors", message))
    for name, text in (("list", "[]"), ("empty", "{}"), ("broken", "{")):
        save_file(video, tmp_path / f"{name}.safetensors", metadata={"config": text})
        refused.append((tmp_path / f"{name}.safetensors", "config"))
    for i, (entries, message) in enumerate([
        (dict(num_attention_heads=0), r"\(HF's vjepa2\): heads must be"), (dict(num_hidden_layers="1"), "depth must"),
        (dict(crop_size=[32, 32]), "size must be"), (dict(hidden_act=[1]), "act must"), (dict(mlp_ratio="x"), "str"),
        (dict(model_type=[1]), "model_type"), ({}, r"\(HF's vjepa2\): Missing key.*patch_embed.proj.weight"),
    ]):
        hf_folder(tmp_path / f"hf{i}", **entries)
        refused.append((tmp_path / f"hf{i}", message))
    for path, message in refused:
        with pytest.raises((ValueError, M.UserError), match=message) as e:
            M.load_encoder(path)
        assert path.name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 200, str(e.value)
    far = tmp_path / ("y" * 200) / "a.pt"
    far.parent.mkdir()
    torch.save(files["extra.pt"][0], far)
    with pytest.raises(ValueError, match=r"yy/a.pt \(V-JEPA 2\): Unexpected key.*zzz") as e:
        M.load_encoder(far)
    assert len(str(e.value)) <= 200


# what goes out: ViT's entries, the class that transformers gives
OUT = {
    "VJEPA2Model": dict(pos="rope", rope_quirk=True),
    "VideoMAEModel": dict(pos="sinusoid1d", final_norm=False),
    "Dinov2Model": dict(pos="learned", images=True, cls=True, tubelet=1),
    "IJepaModel": dict(pos="learned", images=True, tubelet=1),
}


@pytest.mark.parametrize("more", [dict(in_width=128, hidden=64), dict(in_width=64, context=True)])
def test_a_predictor_that_transformers_does_not_have_is_left_out(more, tmp_path, capsys):
    """V-JEPA 2.1's, of several levels or of the context too: its tensors under their names would be spare or wrong."""
    encoder = M.ViT(**{**TINY, **OUT["VJEPA2Model"]})
    predictor = M.Predictor(**more, out_width=64, width=48, depth=1, heads=4, grid=encoder.grid, rope_quirk=True)
    encoder.save_hf(tmp_path, predictor)
    assert "without a predictor" in capsys.readouterr().err
    assert not [name for name in M.read_safetensors(tmp_path / "model.safetensors")[0] if "predictor" in name]
    assert json.loads((tmp_path / "config.json").read_text())["pred_num_hidden_layers"] == 0


@pytest.mark.parametrize("kind", OUT)
def test_transformers_loads_what_we_save(kind, tmp_path):
    """save_hf: AutoModel takes the folder without a missing or a spare key and gives our features (2e-5), and so does
    what load_encoder reads back; a card lies beside."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # a deviation, not `loud`: of VJEPA2Model's 60 channels 60 rotate
    encoder = patterned(M.ViT(**{**TINY, "mlp": 192, **OUT[kind]})).eval()
    predictor = None
    if kind == "VJEPA2Model":
        predictor = patterned(M.Predictor(
            in_width=64, out_width=64, width=48, depth=2, heads=4, grid=encoder.grid, rope_quirk=True)).eval()
    encoder.save_hf(tmp_path, predictor, {"model": "ours", "mean": PIXELS["mean"], "probe_acc": 0.5})
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == kind
    unused = {"pooler.dense.weight", "pooler.dense.bias"}
    assert not set(info["missing_keys"]) - unused and not info["unexpected_keys"], info
    x, keep, pred = clip(), torch.arange(20).expand(2, 20), torch.arange(20, 50).expand(2, 30)
    with torch.no_grad():
        z = encoder(x)
        frames = x.transpose(1, 2)
        if encoder.images:
            want = model.eval()(frames.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 8))
            cls = 1 if encoder.config["cls"] else 0
            want = torch.cat([want[:, :, :cls].flatten(1, 2), want[:, :, cls:].flatten(1, 2)], 1)
        elif predictor is None:
            want = model.eval()(frames).last_hidden_state
        else:
            out = model.eval()(frames, context_mask=[keep], target_mask=[pred])
            want = out.last_hidden_state
            context = z[:, :20]
            guess = predictor([context, context], [keep, keep], [pred, pred])[1]
            print(f"predictions: {gap(guess, out.predictor_output.last_hidden_state):.1e}")
            assert gap(guess, out.predictor_output.last_hidden_state) < 1e-5
        back, config = M.load_encoder(tmp_path)
        print(f"max difference of {kind}: {gap(z, want):.1e} of features up to {z.abs().max():.1f}")
        assert gap(z, want) < 2e-5 and gap(back(x), z) < 1e-5
    assert "| probe_acc | 0.5 |" in (tmp_path / "README.md").read_text()
    assert all(config[name] == value for name, value in encoder.config.items() if name != "frames" or not back.images)


def test_what_transformers_has_no_model_for(tmp_path):
    """One line that names what is in the way, before anything is written."""
    for entries, message in (
        (dict(pos="rope"), "VJEPA2Model has rope_quirk True, and"),
        (dict(pos="rope", rope_quirk=True, highpass=4.0), "VJEPA2Model has highpass 0.0, and"),
        (dict(pos="learned"), "IJepaModel has images True, and"),
        (dict(pos="sincos"), "transformers has no model with sincos positions"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**entries).save_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def metas_pair(predictor_heads=12, **entries):
    encoder = patterned(M.ViT(**{**TINY, "width": 128, "depth": 4, "heads": 4, **entries}))
    names = ("pos", "rope_quirk", "rope_scaled", "stills")
    rope = {name: value for name, value in entries.items() if name in names}
    predictor = M.Predictor(
        in_width=128, out_width=128, width=96, depth=1, heads=predictor_heads, grid=encoder.grid, **rope)
    return encoder, patterned(predictor)


@pytest.mark.parametrize("entries", [
    dict(pos="sincos"), dict(pos="rope", rope_quirk=True), dict(pos="rope", levels=4, stills=True, rope_scaled=16)])
def test_metas_layout_comes_back(entries, tmp_path):
    """save_meta -> load_encoder and load_predictor give the same features, in all three versions' layouts."""
    heads = 4 if entries["pos"] == "sincos" else 12  # a V-JEPA 1 predictor has the encoder's
    encoder, predictor = metas_pair(heads, **entries)
    M.save_meta(tmp_path / "a.pt", encoder, predictor)
    said = dict(frames=8, size=32)
    back, config = M.load_encoder(tmp_path / "a.pt", **said)
    assert {name: config[name] for name in entries} == entries
    assert torch.equal(back(clip()), encoder(clip()))
    guess, _ = M.load_predictor(tmp_path / "a.pt", **said)
    assert guess.heads == heads
    assert all(torch.equal(value, predictor.state_dict()[name]) for name, value in guess.state_dict().items())


@pytest.mark.parametrize("entries, says", [
    (dict(levels=4, rope_quirk=True, rope_scaled=16), "rope_quirk False, and this was trained with True"),
    (dict(levels=4), "rope_scaled 16, and this was trained with 0"),
    (dict(levels=2, rope_scaled=16), "levels 4, and this was trained with 2"),
    (dict(), "rope_quirk True, and this was trained with False"),
    (dict(rope_quirk=True, rope_scaled=16), "rope_scaled 0, and this was trained with 16"),
    (dict(rope_quirk=True, stills=True), "stills False, and"),
    (dict(rope_quirk=True, highpass=4.0), "highpass 0.0, and"),
    (dict(rope_quirk=True, heads=2), "heads 4, and"),
])
def test_what_metas_code_would_read_otherwise_is_not_written(entries, says, tmp_path):
    """Its files do not say these: they follow from the layout."""
    encoder, predictor = metas_pair(**{"pos": "rope", **entries})
    with pytest.raises(ValueError, match=f"Meta's V-JEPA has {says}"):
        M.save_meta(tmp_path / "a.pt", encoder, predictor)
    assert not list(tmp_path.iterdir())


def test_a_predictor_of_other_heads_than_metas_stays_out(tmp_path, capsys):
    encoder, predictor = metas_pair(4, pos="rope", rope_quirk=True)
    M.save_meta(tmp_path / "new" / "a.pt", encoder, predictor)
    assert capsys.readouterr().err == (
        "note: without a predictor: it would be read with 12 heads, not 4; load_encoder wants pos='rope'\n")
    back, _ = M.load_encoder(tmp_path / "new" / "a.pt", frames=8, size=32)
    assert torch.equal(back(clip()), encoder(clip()))


def test_export_of_a_run(tmp_path, monkeypatch, capsys):
    """python model.py export RUN: encoder from the export, predictor from the checkpoint, numbers from the log; what
    does not fit ends with status 2 and one line."""
    torch.manual_seed(0)
    encoder, predictor = metas_pair(pos="rope", rope_quirk=True)
    run = tmp_path / "run"
    run.mkdir()
    M.save_encoder(run / "encoder.safetensors", encoder, encoder.config | PIXELS | {"model": "vit_n", "stride": 4})
    state = {f"model.predictor.{name}": value for name, value in predictor.state_dict().items()}
    M.dcp.save({"model": {name.removeprefix("model."): value for name, value in state.items()}},
               checkpoint_id=run / "saving")
    M.seal(run / "saving", run / "step_00000001", 1)
    (run / "config.json").write_text(json.dumps({"config": {"pred_heads": 12}}))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 1, "probe_acc": 0.25}\n')
    for to, out in (("hf", run / "hf"), ("meta", run / "vjepa.pt")):
        monkeypatch.setattr("sys.argv", ["model.py", "export", str(run), "--to", to])
        M.export_main()
        assert json.loads(capsys.readouterr().out) == {"out": str(out), "params": M.count(encoder)}
        said = dict(frames=8, size=32) if to == "meta" else {}
        back, _ = M.load_encoder(out, **said)
        assert gap(back(clip()), encoder(clip())) < 1e-5
        guess, _ = M.load_predictor(out, **said)
        assert all(torch.equal(value, predictor.state_dict()[name]) for name, value in guess.state_dict().items())
    assert "| probe_acc | 0.25 |" in (run / "hf" / "README.md").read_text()
    M.save_encoder(run / "encoder.safetensors", tiny(), tiny().config | PIXELS)
    monkeypatch.setattr("sys.argv", ["model.py", "export", str(run), "--to", "hf", "--out", str(tmp_path / "no")])
    with pytest.raises(SystemExit) as e:
        M.export_main()
    told = "error: VJEPA2Model has rope_quirk True, and this was trained with False\n"
    assert e.value.code == 2 and capsys.readouterr().err == told
