//! Stand-ins for NVIDIA's libraries: compiled where a test needs them, and found by processes that are told to look there.

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
