//! `arcface-worker data pack` that is broken off and gone on with, with real processes.

use std::{fs, process::Command};

/// A picture of its number.
fn drawn(number: u32) -> image::RgbImage {
    image::RgbImage::from_fn(112, 112, |x, y| {
        image::Rgb([(x * number) as u8, y as u8, number as u8])
    })
}

/// More images than are read at a time, one of which is a pipe that nobody writes into: the command waits there and is killed.
#[test]
fn a_killed_packing_is_gone_on_with_by_the_same_command() {
    const IMAGES: usize = 2500;
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir(at("faces")).unwrap();
    for (number, name) in (0u32..).zip(["faces/0.jpg", "faces/1.jpg", "faces/2.jpg"]) {
        drawn(number).save(at(name)).unwrap();
    }
    fs::write(at("faces/damaged.jpg"), b"\xff\xd8\xff no").unwrap();
    let pipe = at("faces/late.jpg");
    let list: String = (0..IMAGES)
        .map(|place| match place {
            7 | 1030 => format!("damaged.jpg\t{}\n", place / 100),
            2049 => format!("late.jpg\t{}\n", place / 100),
            _ => format!("{}.jpg\t{}\n", place % 3, place / 100),
        })
        .collect();
    fs::write(at("faces/label.txt"), list).unwrap();
    let pack = |out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arcface-worker"));
        command
            .args(["data", "pack", "--skip-damaged", "--mark-every", "0", "-o"])
            .args([at(out), at("faces")]);
        command
    };
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let mut killed = pack("parts").spawn().unwrap();
    // Opens as soon as the command reads it, two marks later.
    let held = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    drop(held);
    let parts = at("parts");
    assert!(!parts.join("train.rec").exists());
    fs::remove_file(&pipe).unwrap();
    fs::copy(at("faces/1.jpg"), &pipe).unwrap();

    let again = pack("parts").output().unwrap();
    let told = String::from_utf8_lossy(&again.stderr);
    assert!(told.contains("goes on after 2048 of 2500 images"), "{told}");
    assert!(
        String::from_utf8_lossy(&again.stdout).contains("2 damaged images were left out"),
        "{again:?}"
    );
    assert!(pack("whole").output().unwrap().status.success());
    for file in ["train.rec", "train.idx", "property"] {
        let [a, b] = ["parts", "whole"].map(|out| fs::read(at(out).join(file)).unwrap());
        assert!(a == b, "{file} is as if nothing had happened");
    }
    assert_eq!(fs::read_dir(&parts).unwrap().count(), 3, "nothing else is left");

    // What stops before its first mark leaves nothing, and the old set.
    let strict = Command::new(env!("CARGO_BIN_EXE_arcface-worker"))
        .args(["data", "pack", "--force", "-o"])
        .args([&parts, &at("faces")])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&strict.stderr);
    assert!(
        strict.status.code() == Some(1) && told.contains("damaged.jpg"),
        "{told}"
    );
    assert_eq!(fs::read_dir(&parts).unwrap().count(), 3, "the old set alone");
}
