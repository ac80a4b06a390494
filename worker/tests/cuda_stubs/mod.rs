//! Stand-ins for NVIDIA's libraries: compiled where a test needs them, and found by processes that are told to look there.

// Not every test has all of them.
#![allow(dead_code)]

use std::{fs, path::Path, process::Command};

/// True where NVIDIA's driver is installed: processes would find that one.
pub fn machine_has_the_real_ones() -> bool {
    let listed = Command::new("ldconfig").arg("-p").output();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    Path::new("/dev/nvidia0").exists() || listed.is_ok_and(|list| list.contains("libcuda.so"))
}

/// Compiles the stand-in `source` of this folder, or an empty library, as `library` in `folder`.
pub fn compile(source: &str, folder: &Path, library: &str) {
    let text = match source {
        "" => {
            let empty = folder.join("empty.c");
            fs::write(&empty, "int arcface_stand_in;\n").expect("write");
            empty
        }
        name => Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/cuda_stubs")
            .join(name),
    };
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2", "-pthread", "-Wall", "-Werror", "-o"])
        .args([&folder.join(library), &text])
        .status();
    assert!(made.expect("a C compiler").success(), "{library}");
}

/// The same of a source in C++ that fits into libtorch.
pub fn compile_for_libtorch(source: &str, folder: &Path, library: &str) {
    let libtorch = std::env::var("LIBTORCH").expect("LIBTORCH is set: . scripts/env.sh");
    let made = Command::new("c++")
        .args(["-shared", "-fPIC", "-O1", "-std=c++17", "-Wall", "-o"])
        .arg(folder.join(library))
        .arg(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/cuda_stubs")
                .join(source),
        )
        .arg("-isystem")
        .arg(Path::new(&libtorch).join("include"))
        .status();
    assert!(made.expect("a C++ compiler").success(), "{library}");
}
