"""A cache that is damaged, or that of something else, is named in one sentence and can be made whole again."""

import json
import shutil

import pytest

from grace.errors import GraceError
from grace.files import read_json
from grace.teacher.commands import finish, info, verify, write
from grace.teacher.identity import expected, processor_pins
from grace.teacher.reader import TeacherCache


def test_a_cache_without_its_index_says_what_to_do(copy):
    folder = copy[-1]
    index = folder / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(
        GraceError, match=r"index.safetensors does not have the bytes .* run `grace cache finish` again"
    ):
        TeacherCache.open(folder)
    finish(*copy)
    assert TeacherCache.open(folder).gate_sum([]) == 0


NAME = "shard-00001-of-00003.safetensors"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_flipped_bit_is_named_and_only_its_shard_is_rebuilt(copy, examples, place):
    out = copy[-1]
    size = (out / NAME).stat().st_size
    flip(out / NAME, int(place * size))
    with pytest.raises(GraceError, match=NAME):
        verify(out)
    with pytest.raises(GraceError, match=NAME):
        TeacherCache.open(out).batch([example.key for example in examples])
    with pytest.raises(GraceError, match=NAME):
        TeacherCache.open(out, verify=True)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    write(*copy)
    verify(out)
    finish(*copy)
    assert {
        path.name for path, before in times.items() if "shard" in path.name and path.stat().st_mtime_ns != before
    } == {NAME}
    TeacherCache.open(out, verify=True)


def test_every_bad_file_is_named_at_once(copy):
    out = copy[-1]
    whole = (out / NAME).read_bytes()
    (out / NAME).write_bytes(whole[:-7])
    (out / "shard-00002-of-00003.safetensors").unlink()
    flip(out / "teacher_head.safetensors", -1)
    with pytest.raises(GraceError) as caught:
        verify(out)
    said = str(caught.value)
    assert f"{NAME} has {len(whole) - 7} of {len(whole)} bytes" in said
    assert "shard-00002-of-00003.safetensors is missing" in said and "teacher_head.safetensors" in said
    assert "shard-00000" not in said
    with pytest.raises(GraceError, match=r"has \d+ of \d+ bytes"):
        TeacherCache.open(out)


def test_a_damaged_head_does_not_reach_a_loss(copy):
    flip(copy[-1] / "teacher_head.safetensors", -1)
    with pytest.raises(GraceError, match=r"teacher_head.safetensors does not have the bytes.*finish"):
        _ = TeacherCache.open(copy[-1]).head


def test_a_damaged_sidecar_means_writing_its_shard_again(copy):
    sidecar = copy[-1] / "shard-00000-of-00003.json"
    sidecar.write_text("{}")
    write(*copy)
    assert read_json(sidecar)["records"] == 2


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_cache_of_something_else_is_refused_in_one_sentence(home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    asked = expected(data, 2.0, home / "teacher")
    TeacherCache.open(home / "sampled", asked)
    TeacherCache.open(home / "hidden", expected(data, 3.0))  # serves every temperature
    shutil.copytree(home / "teacher", tmp_path / "same")
    edit(tmp_path / "same/environment.json", lambda environment: environment.update(code="of another commit"))
    TeacherCache.open(home / "hidden", expected(data, 2.0, tmp_path / "same"))
    with pytest.raises(GraceError, match=r"another temperature \(temperature: 2.0, expected 3.0\)"):
        TeacherCache.open(home / "sampled", {**asked, "temperature": 3.0})
    with pytest.raises(GraceError, match="another teacher"):
        TeacherCache.open(home / "hidden", expected(data, 2.0, home / "student"))
    with pytest.raises(GraceError, match=r"another format \(format: hidden, expected sampled\)"):
        TeacherCache.open(home / "hidden", {"format": "sampled"})
    for path, word in (
        ("chat_template.jinja", "another chat template"),
        ("tokenizer.json", "another tokenizer"),
        ("processor_config.json", "another image processor"),
    ):
        file = data / "processor" / path
        before = file.read_text()
        if path.endswith("json"):
            edit(file, lambda value: value.update(changed=1))
        else:
            file.write_text(before + " ")
        with pytest.raises(GraceError, match=word) as caught:
            TeacherCache.open(home / "hidden", expected(data))
        assert str(caught.value).count("another") == 2  # the fault, and "point to another": nothing else differs
        file.write_text(before)
    with pytest.raises(GraceError, match="not a finished cache"):
        TeacherCache.open(tmp_path)
    with pytest.raises(GraceError, match="not the manifest of a teacher cache"):
        TeacherCache.open(home / "teacher")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda manifest: manifest.pop("tokenizer"), "`tokenizer`: field required"),
        (lambda manifest: manifest.update(records="8"), "`records`: input should be a valid integer"),
        (lambda manifest: manifest.update(temperature=None), "a sampled cache has `temperature`"),
        (lambda manifest: manifest["audit_results"].pop("tokens"), r"`audit_results\.tokens`: field required"),
    ],
)
def test_a_damaged_manifest_of_a_cache_is_named(home, tmp_path, change, said):
    shutil.copy(home / "sampled/manifest.json", tmp_path / "manifest.json")
    edit(tmp_path / "manifest.json", change)
    with pytest.raises(GraceError, match=rf"manifest\.json: .*{said}.*grace cache finish"):
        info(tmp_path)


def test_a_damaged_processor_is_another_one_or_a_sentence(home, tmp_path):
    folder = shutil.copytree(home / "data/processor", tmp_path / "processor")
    whole = processor_pins(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ bos_token }}")
    assert processor_pins(folder)["template"] != whole["template"]
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(GraceError, match=r"processor_config\.json: holds no JSON object"):
        processor_pins(folder)
