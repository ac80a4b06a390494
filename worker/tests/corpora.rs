//! The committed seeds of the fuzz targets (`fuzz/seeds`), replayed: what is called `good` is read, what is called `bad` is
//! refused, and nothing that lies a few bytes beside any of them makes a reader panic.
//!
//! `UPDATE_EXPECT=1` writes the seeds that are made here; `fuzz/pytorch_seeds.py` writes PyTorch's own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use arcface_worker::{
    checkpoint, data, eval, export,
    random::{Purpose, bits},
};
use image::{ExtendedColorType, ImageEncoder, RgbImage, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};
use tch::{Device, Kind, Tensor};

#[path = "../../fuzz/src/readers.rs"]
mod readers;

/// Changed copies of each seed that are read.
const CHANGES: u64 = 1500;
/// Most bytes of a seed: corpora are to stay small.
const LARGEST: usize = 8 << 10;

fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

/// The seeds of a target by name.
fn of(target: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = seeds().join(target);
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push((name, fs::read(entry.path())?));
    }
    files.sort();
    Ok(files)
}

fn picture(side: u32) -> RgbImage {
    RgbImage::from_fn(side, side, |x, y| image::Rgb([(x * 2) as u8, (y * 2) as u8, 90]))
}

fn jpeg(side: u32) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    JpegEncoder::new_with_quality(&mut out, 40).encode_image(&picture(side))?;
    Ok(out)
}

/// A `.rec` with one record, split in three parts if the magic is in it, as MXNet splits it.
fn recordio(labels: &[f32], body: &[u8], split: bool) -> Vec<u8> {
    let mut payload = Vec::new();
    let single = labels.len() == 1;
    payload.extend((if single { 0 } else { labels.len() as u32 }).to_le_bytes());
    payload.extend(labels[0].to_le_bytes());
    payload.extend([7u64.to_le_bytes(), [0; 8]].concat());
    if !single {
        payload.extend(labels.iter().flat_map(|label| label.to_le_bytes()));
    }
    payload.extend(body);
    let parts: Vec<(u32, &[u8])> = match split {
        false => vec![(0, &payload)],
        true => {
            let (first, rest) = payload.split_at(8);
            let (middle, last) = rest.split_at(12);
            vec![(1, first), (2, middle), (3, last)]
        }
    };
    let mut out = Vec::new();
    for (cflag, bytes) in parts {
        out.extend(data::recordio::MAGIC.to_le_bytes());
        out.extend((cflag << 29 | bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// Seeds that this program's own writers and a few lines of bytes make.
fn made() -> Result<Vec<(&'static str, &'static str, Vec<u8>)>> {
    let scratch = tempfile::tempdir()?;
    let values = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
    let tensors = [
        ("conv.weight", values.shallow_clone()),
        ("half", values.to_kind(Kind::Half)),
        ("count", Tensor::from(7i64)),
    ];
    let written = |file: &str| fs::read(scratch.path().join(file));
    let named = || tensors.iter().map(|(name, tensor)| (*name, tensor));
    export::safetensors::write(&scratch.path().join("s"), named())?;
    export::pytorch::write(&scratch.path().join("p"), named())?;
    let safetensors = written("s")?;

    let mut manifest = arcface_proto::v1::CheckpointManifest {
        format: checkpoint::manifest::FORMAT,
        job_id: "job-0123456789ab".into(),
        step: 100,
        num_classes: 10,
        world_size: 2,
        ..Default::default()
    };
    for (file, lo, hi) in [
        ("backbone.safetensors", 0, 0),
        ("head-0-5.safetensors", 0, 5),
        ("head-5-10.safetensors", 5, 10),
    ] {
        manifest.parts.push(arcface_proto::v1::CheckpointPart {
            file: file.into(),
            bytes: 1000,
            blake3: "ab".repeat(32),
            class_lo: lo,
            class_hi: hi,
        });
    }
    checkpoint::write::write_manifest(scratch.path(), &manifest)?;
    let manifest = written(checkpoint::manifest::FILE)?;
    let changed = String::from_utf8(manifest.clone())?.replace("\"step\": 100", "\"step\": 101");

    let mut png = Vec::new();
    PngEncoder::new(&mut png).write_image(&[9; 3 * 16 * 16], 16, 16, ExtendedColorType::Rgb8)?;
    let whole = jpeg(112)?;
    let split = recordio(&[3.0], &[5; 40], true);
    let bin = |flags: &str| {
        let mut out = b"\x80\x02](U\x04\xff\xd8\xff\xe0U\x01bU\x01cq\x01h\x01e](".to_vec();
        out.extend(flags.bytes().map(|flag| if flag == b'1' { 0x88 } else { 0x89 }));
        out.extend(b"e\x86.");
        out
    };
    Ok(vec![
        (
            "recordio",
            "good_one_label",
            recordio(&[3.0], b"\xff\xd8 image", false),
        ),
        (
            "recordio",
            "good_label_array",
            recordio(&[3.0, 1.0, 2.0], b"", false),
        ),
        ("recordio", "good_split", split.clone()),
        ("recordio", "bad_cut_off", split[..split.len() - 8].to_vec()),
        ("recordio", "bad_no_magic", vec![0; 64]),
        ("idx", "good_in_order", b"0\t0\n1\t188\n2\t9000\n".to_vec()),
        ("idx", "good_any_order", b"7\t80\r\n3\t40\n\n5\t0\n".to_vec()),
        ("idx", "bad_twice", b"1\t0\n1\t8\n".to_vec()),
        ("idx", "bad_spaces", b"1 0\n".to_vec()),
        ("pickle_bin", "good_two_pairs", bin("10")),
        ("pickle_bin", "bad_three_flags", bin("101")),
        (
            "pickle_bin",
            "bad_global",
            b"cposix\nsystem\n(U\x04echotR.".to_vec(),
        ),
        ("pt_zip", "good_ours", written("p")?),
        (
            "safetensors",
            "bad_cut_off",
            safetensors[..safetensors.len() - 3].to_vec(),
        ),
        (
            "safetensors",
            "bad_length",
            [&[0xff; 8], &safetensors[8..]].concat(),
        ),
        ("safetensors", "good_three_kinds", safetensors),
        ("jpeg_record", "bad_half", whole[..whole.len() / 2].to_vec()),
        ("jpeg_record", "bad_size", jpeg(32)?),
        ("jpeg_record", "bad_small_png", png),
        ("jpeg_record", "good_crop", whole),
        ("manifest", "bad_step", changed.into_bytes()),
        ("manifest", "bad_json", b"{\"format\": 1}".to_vec()),
        ("manifest", "good_two_ranks", manifest),
    ])
}

#[test]
fn the_seeds_that_are_made_here_are_as_committed() -> Result<()> {
    for (target, name, bytes) in made()? {
        let path = seeds().join(target).join(name);
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::create_dir_all(path.parent().context("a folder")?)?;
            fs::write(&path, &bytes)?;
        }
        let committed = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(
            committed == bytes,
            "{target}/{name} has changed: UPDATE_EXPECT=1 writes it"
        );
    }
    Ok(())
}

#[test]
fn good_seeds_are_read_and_bad_ones_refused() -> Result<()> {
    for (target, read) in readers::READERS {
        let seeds = of(target)?;
        ensure!(!seeds.is_empty(), "{target} has no seeds");
        for (name, bytes) in seeds {
            ensure!(
                bytes.len() <= LARGEST,
                "{target}/{name} has {} bytes",
                bytes.len()
            );
            let accepted = read(&bytes);
            ensure!(
                accepted || !name.starts_with("good"),
                "{target}/{name} is refused"
            );
            ensure!(
                !accepted || !name.starts_with("bad"),
                "{target}/{name} is accepted"
            );
        }
    }
    Ok(())
}

/// One to four bytes are others, or the end is missing.
fn change(bytes: &mut Vec<u8>, seed: u64) {
    let draw = |n| bits(seed, Purpose::Synthetic, n, 0);
    for n in 1..=1 + draw(0) % 4 {
        let place = (draw(2 * n) % bytes.len().max(1) as u64) as usize;
        if let Some(byte) = bytes.get_mut(place) {
            *byte = draw(2 * n + 1) as u8;
        }
    }
    if draw(100) % 5 == 0 {
        bytes.truncate((draw(101) % bytes.len().max(1) as u64) as usize);
    }
}

#[test]
fn changed_seeds_are_read_or_refused() -> Result<()> {
    for (target, read) in readers::READERS {
        let mut accepted = 0;
        let seeds = of(target)?;
        for (_, bytes) in &seeds {
            for seed in 0..CHANGES {
                let mut changed = bytes.clone();
                change(&mut changed, seed);
                accepted += u64::from(read(&changed));
            }
        }
        println!(
            "{target}: {accepted} of {} changed seeds are still read",
            CHANGES * seeds.len() as u64
        );
    }
    Ok(())
}
