"""Signatures: what is covered, what is named when it changed, what is said without the extra."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from expo.errors import ExpoError, SpecError
from expo.publishing.signature import check_signature, sign

from .conftest import Ran

pytestmark = pytest.mark.filterwarnings("ignore")


def write_keys(
    folder: Path, name: str = "key", curve: ec.EllipticCurve | None = None
) -> tuple[Path, Path]:
    private = ec.generate_private_key(curve or ec.SECP256R1())
    return _written(folder, name, private)


def _written(folder: Path, name: str, private) -> tuple[Path, Path]:
    pem = serialization.Encoding.PEM
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    paths[0].write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    paths[1].write_bytes(
        private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return paths


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Any folder will do."""
    (tmp_path / "out" / ".eval_results").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md", ".eval_results/a.yaml"):
        (tmp_path / "out" / name).write_bytes(name.encode() * 100)
    return tmp_path / "out"


def test_the_folder_may_be_named_from_where_one_stands(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    monkeypatch.chdir(tmp_path)
    sign(Path("out"), private)
    assert check_signature(Path("out"), public).status == "pass"
    assert check_signature(out, public).status == "pass"


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name
)
def test_what_was_signed_holds_wherever_it_lies(
    out: Path, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    private, public = write_keys(tmp_path, curve=curve)
    assert sign(out, private) == out / "model.sig"
    assert check_signature(out, public).status == "pass"
    assert str(tmp_path) not in (out / "model.sig").read_text()
    moved = tmp_path / "snapshot"
    shutil.copytree(out, moved)
    (moved / ".gitattributes").write_text("*.safetensors lfs")
    (moved / ".cache" / "huggingface").mkdir(parents=True)
    (moved / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (moved / "config.json").unlink()
    (moved / "config.json").symlink_to(out / "config.json")  # as in the Hub's cache
    assert check_signature(moved, public).status == "pass"


def test_signing_again_changes_nothing(out: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    first = sign(out, private).read_bytes()
    assert sign(out, private).read_bytes() == first
    (out / "README.md").write_text("another")
    assert sign(out, private).read_bytes() != first
    assert check_signature(out, public).status == "pass"


def test_the_changed_file_is_named(out: Path, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    private, public = write_keys(tmp_path)
    sign(out, private)
    shard = next(out.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ran = expo("verify", out, "--signature", public, "--quick", "--json")
    assert ran.code == 3
    (found,) = [check for check in json.loads(ran.out)["checks"] if check["name"] == "signature"]
    assert found["message"] == f"{shard.name} is not the file that was signed"
    (out / "generation_config.json").write_text("{}")
    (out / "config.json").unlink()
    message = check_signature(out, public).message
    assert "config.json was signed and is missing" in message
    assert "generation_config.json was not signed" in message


def test_another_key_and_a_damaged_signature(
    out: Path, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    private, public = write_keys(tmp_path)
    _, other = write_keys(tmp_path, "other")
    assert check_signature(out, public).message == "there is no model.sig"
    sign(out, private)
    assert check_signature(out, other).message == "model.sig was made by another key"
    signature = json.loads((out / "model.sig").read_text())
    envelope = signature["dsseEnvelope"]
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAAA"
    (out / "model.sig").write_text(json.dumps(signature))
    assert check_signature(out, public).status == "error"
    (out / "model.sig").write_text("{")
    assert "model.sig cannot be checked" in check_signature(out, public).message
    ran = expo("verify", out, "--signature", tmp_path / "none.pub")
    assert ran.code == 2
    assert (
        ran.err
        == f"expo: {tmp_path / 'none.pub'} cannot be used as a public EC key in PEM: No such file or directory\n"
    )
    assert expo("verify", out, "--signature", private).code == 2


def test_keys_that_are_none(out: Path, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    with pytest.raises(
        SpecError, match="cannot be used as a private EC key in PEM: not one, or it has a password"
    ):
        sign(out, public)
    secret, _ = _written(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    with pytest.raises(SpecError, match="is no elliptic-curve key"):
        sign(out, secret)
    assert not (out / "model.sig").exists()


def test_without_the_extra_it_is_one_line(out: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['model_signing'] = None\nfrom expo.cli.main import main\n"
        "main(['verify', sys.argv[1], '--signature', 'key.pub'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "expo: signatures need model-signing (no module model_signing): pip install 'expo-merge[sign]'"
    ]
    assert issubclass(SpecError, ExpoError)
