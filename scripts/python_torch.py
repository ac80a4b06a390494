"""Unpacks the Python half of the torch wheel for the tests, to compute on the CPU with the libtorch that is there:

    python3 scripts/python_torch.py TORCH.whl LIBTORCH TARGET

The wheel's Python half links to the CUDA half, whose libraries take 5 GB and are of no use without a GPU. In their
place stand small libraries with the names that the linker asks for: nothing calls them in a program that stays on
the CPU. Needs cc and nm.
"""

import os
import shutil
import subprocess
import sys
import zipfile

# Of the wheel's libraries only these are taken; the rest comes from LIBTORCH, or is a stand-in.
UNPACKED = ["libtorch_python.so", "libtorch_global_deps.so", "libc10_cuda.so", "libshm.so"]
STAND_INS = ["libtorch_cuda.so", "libcudnn.so.9", "libcufile.so.0"]
SYSTEM = ["libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"]


def unpack(wheel, target):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            folder, _, name = entry.filename.rpartition("/")
            top = folder.split("/")[0]
            if not name or top not in ("torch", "torchgen", "functorch"):
                continue
            if folder.startswith(("torch/include", "torch/share")):
                continue
            if folder == "torch/lib" and name not in UNPACKED or folder == "torch/bin" and name != "torch_shm_manager":
                continue
            path = archive.extract(entry, target)
            if folder == "torch/bin":
                os.chmod(path, 0o755)


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def symbols(library):
    """What a library wants and what it has."""
    wanted, has = set(), set()
    for line in output("nm", "-D", "--format=posix", library).splitlines():
        name, kind = line.split()[:2]
        if kind == "U":
            wanted.add(name.split("@")[0])
        elif kind not in "vw":
            has.add(name.split("@")[0])
    return wanted, has


def stand_in(name):
    """Assembler text of a symbol that must exist for the program to start."""
    if name.startswith("_ZTI"):  # type information is compared by name when classes are registered
        return f"""
            .data
            .balign 16
            .globl {name}
            {name}: .quad _ZTVN10__cxxabiv117__class_type_infoE + 16, 1f, 0
            1: .asciz "{name[4:]}" """
    if name.startswith("_ZTV"):  # functions of objects that are never made
        return f".bss; .balign 16; .globl {name}; {name}: .zero 512"
    # Some are called at the start and give a reference: that of zeros, which also reads as false.
    return f".text; .globl {name}; {name}: lea zeros(%rip), %rax; ret"


def main():
    wheel, libtorch, target = sys.argv[1:]
    unpack(wheel, target)
    lib = os.path.join(target, "torch", "lib")
    for name in os.listdir(os.path.join(libtorch, "lib")):
        if ".so" in name and name not in UNPACKED:
            os.symlink(os.path.join(os.path.abspath(libtorch), "lib", name), os.path.join(lib, name))
    wanted, has = set(), set()
    for name in sorted(os.listdir(lib)):
        if ".so" in name:
            needs, offers = symbols(os.path.join(lib, name))
            wanted |= needs if name in UNPACKED else set()
            has |= offers
    for name in SYSTEM:
        has |= symbols(output("cc", f"-print-file-name={name}").strip())[1]
    missing = sorted(name for name in wanted - has if not name.startswith(("Py", "_Py")))
    source = os.path.join(lib, "stand_ins.s")
    with open(source, "w") as file:
        file.write('.section .note.GNU-stack, "", @progbits\n.bss\n.balign 4096\nzeros: .zero 4096\n')
        file.writelines(stand_in(name) + "\n" for name in missing)
    subprocess.run(["cc", "-shared", source, "-lstdc++", "-o", f"{lib}/{STAND_INS[0]}"], check=True)
    for name in STAND_INS[1:]:
        shutil.copy(f"{lib}/{STAND_INS[0]}", f"{lib}/{name}")


if __name__ == "__main__":
    main()
