#!/bin/sh
# Makes the virtual environment DIR with PyTorch and transformers for the tests, on Linux x86-64 without a GPU.
#
#     install_torch.sh DIR [TRANSFORMERS_VERSION]        python: $PYTHON, else python3
#
# PyPI's PyTorch for this platform is built with CUDA: with all that it asks for, 6 GB. Of its one wheel this takes what
# works on the processor, and puts small libraries in the place of CUDA's: their functions answer cudaErrorNoDevice (100),
# those of PyTorch's own CUDA library the address of zeros. Needs a C compiler and binutils' `nm`.
set -eu

dir=${1:?usage: install_torch.sh DIR [TRANSFORMERS_VERSION]}
transformers=${2:-5.24.0}
torch=2.11.0

"${PYTHON:-python3}" -m venv "$dir"
pip="$dir/bin/python -m pip --disable-pip-version-check --no-cache-dir -q"
$pip install filelock typing-extensions sympy networkx jinja2 fsspec "setuptools<82" numpy pytest "transformers==$transformers"

wheel=$(mktemp -d "$dir/wheel.XXXXXX")
trap 'rm -rf "$wheel"' EXIT
$pip download --no-deps -d "$wheel" "torch==$torch"

"$dir/bin/python" - "$wheel"/torch-*.whl <<'PYTHON'
import collections
import ctypes
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

CUDA = ["libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"]
LEFT_OUT = ("torch/bin/p", "torch/share/", *(f"torch/lib/{name}" for name in CUDA))

site = pathlib.Path(sysconfig.get_paths()["purelib"])
with zipfile.ZipFile(sys.argv[1]) as archive:
    for name in archive.namelist():
        if not name.startswith(LEFT_OUT):
            archive.extract(name, site)
lib = site / "torch" / "lib"


def symbols(which: str, library: pathlib.Path) -> set[tuple[str, str]]:
    """Names and versions of a library's dynamic symbols, those that it has or those that it asks for."""
    found = subprocess.run(["nm", "-D", which, "--with-symbol-versions", library], capture_output=True, text=True, check=True)
    names = (line.split()[-1].replace("@@", "@").partition("@") for line in found.stdout.splitlines() if line)
    return {(name, version) for name, _, version in names}


system = [ctypes.CDLL(name) for name in ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6")]
libraries = sorted(lib.glob("*.so"))
defined = {name for library in libraries for name, _ in symbols("--defined-only", library)}
missing = collections.defaultdict(set)
for library in libraries:
    for name, version in symbols("--undefined-only", library):
        if version.startswith(("libcud", "libcup")):
            missing[version].add(name)  # CUDA's libraries name their versions after themselves
        elif not version and name not in defined and not name.startswith(("Py", "_Py", "_ITM", "__gmon")):
            if any(hasattr(library, name) for library in system):
                continue
            missing["libtorch_cuda.so"].add(name)
missing["libcufile.so.0"] = set()

for target, names in missing.items():
    text = [".local nothing", ".comm nothing, 4096, 256"]
    for name in sorted(names):
        text.append(f".globl {name}")
        if name.startswith("_ZTI"):  # Python's bindings read the names of types
            content = f".quad _ZTVN10__cxxabiv117__class_type_infoE + 16, 1f\n1: .asciz \"{name[4:]}\""
            text.append(f".data\n.balign 16\n.type {name}, @object\n{name}: {content}")
        elif name.startswith("_ZTV"):
            text.append(f".data\n.balign 16\n.type {name}, @object\n{name}: .zero 512")
        else:
            is_address = name.startswith("_Z") or name.endswith(("String", "ErrorName"))
            answer = "lea nothing(%rip), %rax" if is_address else "mov $100, %eax"
            if name == "cudaStreamIsCapturing":  # transformers asks at every forward: success, and nothing captures
                answer = "xor %eax, %eax"
            text.append(f".text\n.type {name}, @function\n{name}: {answer}\nret")
    source, script = lib / f"{target}.s", lib / f"{target}.map"
    source.write_text("\n".join(text) + '\n.section .note.GNU-stack,"",@progbits\n')
    script.write_text(f"{target} {{ global: *; }};" if target not in ("libtorch_cuda.so", "libcufile.so.0") else "{ global: *; };")
    flags = ["-shared", "-nostartfiles", f"-Wl,-soname,{target}", f"-Wl,--version-script,{script}"]
    subprocess.run(["cc", *flags, "-o", lib / target, source, "-lstdc++"], check=True)
    source.unlink()
    script.unlink()
PYTHON

"$dir/bin/python" -c "
import torch, transformers
assert not torch.cuda.is_available()
assert torch.equal(torch.eye(3) @ torch.eye(3), torch.eye(3))
print('torch', torch.__version__, 'transformers', transformers.__version__)"
