"""Machine code is compiled once, kept, and never trusted when damaged."""

import threading

import pytest

from bitnet.ops.build import BuildError, FolderError
from bitnet.ops.cuda import nvrtc
from bitnet.ops.cuda.nvrtc import architecture_for, library, machine_code

KNOWN = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]  # what NVRTC 13.0 compiles for


@pytest.fixture
def compilations(monkeypatch):
    """A compiler without NVRTC; the options of each compilation."""
    done = []

    def compiled(compiler, source, options):
        done.append(options)
        return b"cubin of " + options[0].encode() + source[:20]

    monkeypatch.setattr(nvrtc, "library", lambda: None)
    monkeypatch.setattr(nvrtc, "supported_architectures", lambda compiler: KNOWN)
    monkeypatch.setattr(nvrtc, "version", lambda compiler: (13, 0))
    monkeypatch.setattr(nvrtc, "compiled", compiled)
    return done


def test_a_second_process_takes_the_code_from_the_cache(compilations, tmp_path):
    first = machine_code((9, 0), tmp_path)
    assert machine_code((9, 0), tmp_path) == first
    assert len(compilations) == 1
    assert machine_code((8, 0), tmp_path) != first


@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda code: b"", lambda code: b"X" + code[1:]])
def test_a_damaged_file_is_built_again(compilations, tmp_path, damage):
    code = machine_code((8, 9), tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(code))
    assert machine_code((8, 9), tmp_path) == code
    assert len(compilations) == 2
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [code]


def test_a_damaged_file_that_another_process_repairs_meanwhile_stays(compilations, tmp_path, monkeypatch):
    code = machine_code((8, 9), tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(code[:-1])
    compiled = nvrtc.compiled

    def repaired_meanwhile(*arguments):
        assert path.exists()
        path.write_bytes(code)
        return compiled(*arguments)

    monkeypatch.setattr(nvrtc, "compiled", repaired_meanwhile)
    assert machine_code((8, 9), tmp_path) == code
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [code]


def test_a_damaged_file_goes_once_there_is_a_whole_one_under_another_name(compilations, tmp_path, monkeypatch):
    machine_code((8, 9), tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    monkeypatch.setattr(nvrtc, "compiled", lambda *_: b"other bits of the same program")
    assert machine_code((8, 9), tmp_path) == b"other bits of the same program"
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"other bits of the same program"]


def test_a_file_that_vanishes_while_it_is_read_is_none(compilations, tmp_path, monkeypatch):
    machine_code((8, 9), tmp_path)

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(
        nvrtc.Path,
        "read_bytes",
        lambda path, read=nvrtc.Path.read_bytes: gone(path) if path.suffix == ".cubin" else read(path),
    )
    machine_code((8, 9), tmp_path)
    assert len(compilations) == 2


@pytest.mark.parametrize("change", ["source", "version", "options"])
def test_another_source_compiler_or_option_is_compiled_anew(compilations, tmp_path, monkeypatch, change):
    machine_code((8, 0), tmp_path)
    if change == "source":
        changed = tmp_path / "other.cu"
        changed.write_bytes(nvrtc.SOURCE.read_bytes() + b"\n")
        monkeypatch.setattr(nvrtc, "SOURCE", changed)
    elif change == "version":
        monkeypatch.setattr(nvrtc, "version", lambda compiler: (13, 1))
    else:
        monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--maxrregcount=32"))
    machine_code((8, 0), tmp_path)
    assert len(compilations) == 2


def test_those_that_compile_at_once_all_get_whole_code_and_leave_one_file(compilations, tmp_path, monkeypatch):
    together, compiled, found = threading.Barrier(4), nvrtc.compiled, []

    def slow(*arguments):
        together.wait()
        return compiled(*arguments) * 1000

    monkeypatch.setattr(nvrtc, "compiled", slow)
    threads = [threading.Thread(target=lambda: found.append(machine_code((8, 0), tmp_path))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(compilations) == 4
    assert len(set(found)) == 1
    assert [each.read_bytes() for each in tmp_path.iterdir()] == found[:1]


def test_a_folder_that_cannot_be_written_costs_only_time(compilations, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert machine_code((8, 0), blocked / "kernels") == machine_code((8, 0), tmp_path)


@pytest.mark.parametrize("name", ["default_folder", "find_cached"])
def test_a_user_without_a_home_or_a_cache_that_can_be_read_compiles_all_the_same(
    compilations, tmp_path, monkeypatch, name
):
    def refuse(*_):
        raise FolderError("no home") if name == "default_folder" else PermissionError("read-only")

    expected = machine_code((8, 0), tmp_path)
    monkeypatch.setattr(nvrtc, name, refuse)
    assert machine_code((8, 0)) == expected
    assert len(compilations) == 2


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 80), ((8, 6), 86), ((9, 0), 90), ((10, 0), 100), ((10, 1), 100), ((12, 1), 121)],
)
def test_the_newest_architecture_that_runs_on_the_device_is_chosen(capability, expected):
    assert architecture_for(capability, KNOWN) == expected


@pytest.mark.parametrize(("capability", "message"), [((7, 5), "has 7.5"), ((13, 0), "newest is sm_121: update torch")])
def test_devices_without_machine_code_are_refused_with_the_reason(capability, message):
    with pytest.raises(BuildError, match=message):
        architecture_for(capability, KNOWN)


@pytest.mark.parametrize(
    ("cuda", "wheel"),
    [
        (None, r'"nvidia-cuda-nvrtc==13\.\*"'),
        ("13.0", r'"nvidia-cuda-nvrtc==13\.\*"'),
        ("12.8", "nvidia-cuda-nvrtc-cu12"),
    ],
)
def test_without_nvrtc_the_error_says_what_to_install(monkeypatch, cuda, wheel):
    def missing(name):
        raise OSError(name)

    library.cache_clear()
    monkeypatch.setattr(nvrtc.torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc, "wheel_folders", list)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", missing)
    with pytest.raises(BuildError, match=f"pip install {wheel}$"):
        library()


def test_an_error_of_the_compiler_is_shown(tmp_path, monkeypatch):
    try:
        library()
    except BuildError as error:
        pytest.skip(str(error))
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { nonsense; }")
    monkeypatch.setattr(nvrtc, "SOURCE", broken)
    with pytest.raises(BuildError, match='identifier "nonsense" is undefined'):
        machine_code((9, 0), tmp_path)
